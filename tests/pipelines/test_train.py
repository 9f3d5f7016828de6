"""Training: what each worker reads, and runs that stop, go on, and are refused."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch

from layered_model import LayeredPipeline
from pipelines import batches, prepare, train
from pipelines.batches import windows
from pipelines.config import UserError
from pipelines.dataset import PreparedDataset, RowGroup, decode_rows, text_of, text_rows
from pipelines.schema import IMAGE, TEXT, TEXT_LENGTHS
from pipelines.trainer import learning_rate
from tests.pipelines.conftest import SMALL_MODEL

GROUPS = [RowGroup(f"{k}.parquet", 0, 5 + k % 3) for k in range(11)]
NUM_ROWS = sum(group.num_rows for group in GROUPS)


def _rows(chosen: list[batches.Window], num_rows: int) -> list[tuple[str, int]]:
    """The rows that a worker sees, in its order: file, and place in the group."""
    seen = []
    for window in chosen:
        places = [(group.path, row) for group in window.groups for row in range(group.num_rows)]
        order = np.random.default_rng(window.seed).permutation(len(places))[window.skip :]
        seen += [places[i] for i in order]
    return seen[:num_rows]


def test_an_epoch_is_every_group_once_in_an_order_of_its_own() -> None:
    sequence = list(islice(batches.group_sequence(GROUPS, seed=1), 2 * len(GROUPS)))
    first, second = sequence[: len(GROUPS)], sequence[len(GROUPS) :]
    assert sorted(first) == sorted(second) == sorted(GROUPS)
    assert first != second
    again = list(islice(batches.group_sequence(GROUPS, seed=1), 2 * len(GROUPS)))
    assert again == sequence


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_are_dealt_every_group_of_the_sequence_once(world_size: int) -> None:
    dealt = [
        [
            group
            for window in windows(
                GROUPS, seed=0, rank=rank, world_size=world_size, first=0, num_rows=NUM_ROWS
            )
            for group in window.groups
        ]
        for rank in range(world_size)
    ]
    merged = [group for together in zip(*dealt, strict=False) for group in together]
    sequence = batches.group_sequence(GROUPS, seed=0)
    assert merged == list(islice(sequence, len(merged)))
    assert len(merged) >= len(GROUPS)


@pytest.mark.parametrize("first", [1, 17, 60, 200])
def test_a_worker_that_goes_on_sees_what_it_would_have_seen(first: int) -> None:
    options = {"seed": 3, "rank": 1, "world_size": 2}
    whole = windows(GROUPS, first=0, num_rows=first + 100, **options)
    rest = windows(GROUPS, first=first, num_rows=100, **options)
    assert _rows(rest, 100) == _rows(whole, first + 100)[first:]


def test_a_window_is_read_shuffled_with_its_text(configure, without_ray) -> None:
    config = configure()
    prepare.run(config)
    dataset = PreparedDataset.open(config.dataset)
    groups = dataset.row_groups("train")
    window = windows(groups, seed=0, rank=0, world_size=1, first=0, num_rows=8)[0]
    read = batches.ReadWindows((window,), config.text.max_tokens)
    blocks = list(read({"id": [0]}))
    pictures = np.concatenate([block[batches.PICTURE] for block in blocks])
    table = dataset.read("train", [IMAGE, TEXT, TEXT_LENGTHS])
    texts: dict[bytes, list[np.ndarray]] = {}  # some rows have the same picture
    for picture, row in zip(decode_rows(table), text_rows(table), strict=True):
        captions = [text_of(row, k) for k in range(len(row[TEXT_LENGTHS]))]
        texts.setdefault(picture.tobytes(), []).extend(captions)
    assert len(pictures) == window.num_rows
    assert {picture.tobytes() for picture in pictures} <= set(texts)
    for block in blocks:
        for picture, tokens, count in zip(*(block[key] for key in block), strict=True):
            assert not tokens[count:].any()
            assert any(np.array_equal(tokens[:count], t) for t in texts[picture.tobytes()])


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


def _with(config, run: str, num_images: int):
    changed = dataclasses.replace(config.train, num_images=num_images)
    return dataclasses.replace(config, run=run, train=changed)


@pytest.mark.ray
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(
    configure, without_ray, local_ray, tmp_path
) -> None:
    config = configure(*SMALL_MODEL, *TINY, "train.ema_snapshot_widths=[0.05,0.1]")
    prepare.run(config)
    straight = _with(config, str(tmp_path / "straight"), 48)
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
