"""What all tests share: shape checks for `layered_model`, one local Ray, a small T5, and real photographs where there are any."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Machines that test are busy: how long an example takes says nothing.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

REPOSITORY = Path(__file__).resolve().parents[1]

QUICK_RAY = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
    # Else Ray's workers are the nicest, and starve beside a process that runs other tests.
    "RAY_worker_niceness": "0",
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
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small DINOv2 of random weights."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    directory = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56
    )
    Dinov2Model(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Real photographs in COCO's layout: ``annotations/captions_{train,val}2017.json``, ``train2017/``, ``val2017/``."""
    data = Path(os.environ.get("LAYERED_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "coco_mini" / "annotations").is_dir():
        pytest.skip("no coco_mini; name the folder that holds it in LAYERED_TEST_DATA")
    return data / "coco_mini"


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Photographs of Flickr8k, 256 pixels at most: ``train/`` and ``val/``."""
    data = Path(os.environ.get("LAYERED_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (data / "flickr8k" / "val").is_dir():
        pytest.skip("no flickr8k; name the folder that holds it in LAYERED_TEST_DATA")
    return data / "flickr8k"


@pytest.fixture(scope="session")
def seeded_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the form of the FID Inception network's, with weights from a seed.

    Each filter sums to zero, which cancels what all pictures have in common; without that features of random weights are nearly
    of rank 1, and every picture of the same class.
    """
    import numpy as np
    import torch

    from layered_model.inception import Inception

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Inception().state_dict().items()}
    rng = np.random.RandomState(0)  # whose stream numpy has promised not to change
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        value = rng.random_sample(shape) * 12**0.5 - 3**0.5  # of variance 1
        if len(shape) == 4:
            value -= value.mean((1, 2, 3), keepdims=True)
            value *= (2 / value[0].size) ** 0.5
        elif key == "fc.weight":
            value -= value.mean(1, keepdims=True)
        elif key.endswith(("running_var", "bn.weight")):
            value = 1 + 0.2 * value
            if key.startswith("Mixed_7c") and key.endswith("weight"):
                value *= 2  # features as large as trained ones
        else:
            value *= 0.1
        state[key] = torch.from_numpy(value.astype(np.float32))
    path: Path = tmp_path_factory.mktemp("inception") / "seeded.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def drawn_pictures() -> Callable[..., Any]:
    """Draws pictures, uint8 [n, 64, 64, 3]: coloured squares of `cell` pixels with noise, from a seed."""
    import numpy as np

    def draw(count: int, seed: int, cell: int = 8, noise: int = 20) -> Any:
        rng = np.random.RandomState(seed)
        coarse = rng.randint(0, 256, (count, 64 // cell, 64 // cell, 3))
        fine = rng.randint(-noise, noise + 1, (count, 64, 64, 3))
        squares = coarse.repeat(cell, axis=1).repeat(cell, axis=2)
        return (squares + fine).clip(0, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def clip(tmp_path_factory, word_tokenizer) -> Path:
    """A directory with a small random CLIP."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    directory = tmp_path_factory.mktemp("clip")
    num_words = word_tokenizer(directory)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": num_words, "max_position_embeddings": 8, "eos_token_id": 1}
    heads = {"num_attention_heads": 2, "projection_dim": 12}
    config = CLIPConfig(
        text_config=shape | heads | text,
        vision_config=shape | heads | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(directory)
    return directory
