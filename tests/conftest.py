"""What all tests share: shape checks for `layered_model`, one local Ray, a small T5, and real photographs where there are any."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

QUICK_RAY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
}
"""On top of `session.ENVIRONMENT`: what makes many small Ray runs quick."""

NUM_CPUS = 4
"""Logical: two train workers, and two for tasks."""

VOCABULARY = "a red apple on white background two dogs run after ball while child laughs cat"
"""Of the small T5."""

CHECKER = (
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, "
    "hint_overrides=beartype.FrozenDict({beartype.typing.Self: object})))"
)
"""For jaxtyping's hook. An int is a float; `Self`, which beartype knows only of classes that it decorates itself, is anything."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--no-shape-checks",
        action="store_true",
        help="leave jaxtyping's checks out; tests marked compile need that",
    )
    # Not in `pytest_configure`: named on the command line, a test's folder has its conftest loaded before that, which imports
    # `layered_model`. A worker of xdist is given its controller's arguments.
    arguments = pluginmanager.get_plugin("pytestconfig").invocation_params.args
    if not parser.parse_known_args(arguments).no_shape_checks:
        jaxtyping.install_import_hook("layered_model", CHECKER)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # First what uses Ray: so one process of xdist's has it all, until another has nothing left and takes from its end.
    items.sort(key=lambda item: "ray" not in item.keywords)
    if config.getoption("--no-shape-checks"):
        return
    skip = pytest.mark.skip(reason="needs --no-shape-checks: jaxtyping's wrappers do not compile")
    for item in items:
        if "compile" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls go without jaxtyping, as a user's do: to test what our own code says about a wrong type or shape, or to be quick."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def s3_port() -> int:
    """Where the tests' S3 server listens once a test asks for it; in the environment before Ray starts, whose workers have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return port


@pytest.fixture(scope="session")
def local_ray(s3_port: int) -> Iterator[None]:
    """A local Ray for the whole run, which `session.connect` finds running."""
    from pipelines import session

    os.environ.update(QUICK_RAY)
    session.set_environment()
    import ray

    # Not tmp_path: Ray's sockets allow a short path only.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[[Path], int]:
    """Writes a real tokenizer of a few words into a directory; returns how many it has."""

    def write(directory: Path) -> int:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = ["<pad>", "</s>", "<unk>", *VOCABULARY.split()]
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(directory)
        return len(words)

    return write


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Callable[[Path], int]) -> Path:
    """A directory with a small T5 of random weights and a real tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    directory = tmp_path_factory.mktemp("t5")
    num_words = word_tokenizer(directory)
    torch.manual_seed(0)
    config = T5Config(vocab_size=num_words, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Real photographs in COCO's layout: ``annotations/captions_{train,val}2017.json``, ``train2017/``, ``val2017/``."""
    data = Path(os.environ.get("LAYERED_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "coco_mini" / "annotations").is_dir():
        pytest.skip("no coco_mini; name the folder that holds it in LAYERED_TEST_DATA")
    return data / "coco_mini"
