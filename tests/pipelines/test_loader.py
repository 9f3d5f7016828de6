"""The loader: the dataset's rows as `Order` has them, whoever reads them, wherever they lie, with any number of threads."""

import gc
import itertools
import json
import shutil
import time
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import loader, prepare, schema
from pipelines.config import UserError
from pipelines.dataset import PreparedDataset, text_of, text_rows
from pipelines.loader import DECODE_AHEAD, Batch, Group, Share, batches, choose
from pipelines.order import Order
from pipelines.schema import TEXT, TEXT_LENGTHS
from tests.pipelines.conftest import flip_a_picture

NUM_PICTURES = 67
BATCH = 12
READ_AHEAD = 12


@pytest.fixture
def make_dataset(configure, without_ray, monkeypatch, tmp_path):
    """Prepares pictures that tell their number by their colour, in files of 16 rows and groups of 4."""
    folder = tmp_path / "numbered"
    folder.mkdir()
    images, annotations = [], []
    for number in range(NUM_PICTURES):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        annotations += [
            {"id": 10 * number + k, "image_id": number, "caption": f"p{number} " + "word " * k}
            for k in range(5)
        ]
    captions = tmp_path / "numbered.json"
    captions.write_text(json.dumps({"images": images, "annotations": annotations}))
    monkeypatch.setattr(schema, "ROWS_PER_GROUP", 4)

    def make(path: str) -> PreparedDataset:
        ours = [f"data.train_annotations={captions}", f"data.train_images={folder}"]
        prepare.run(configure(*ours, "data.rows_per_file=16", f"dataset={path}"))
        return PreparedDataset.open(path)

    return make


@pytest.fixture(scope="module")
def made_once() -> list[Path]:
    """Where `dataset` keeps its files for the next test."""
    return []


@pytest.fixture
def dataset(make_dataset, made_once, tmp_path, tmp_path_factory) -> PreparedDataset:
    """In ``tmp_path/set``; each test has a copy."""
    if not made_once:
        path = tmp_path_factory.mktemp("loader") / "set"
        make_dataset(str(path))
        made_once.append(path)
    return PreparedDataset.open(str(shutil.copytree(made_once[0], tmp_path / "set")))


def _share(**changes) -> Share:
    return Share(**{"seed": 5, "batch_size": BATCH, "text_dropout": 0.1, **changes})


def _take(dataset: PreparedDataset, count: int, **changes) -> list[Batch]:
    with closing(batches(dataset, "train", _share(**changes))) as stream:
        return list(itertools.islice(stream, count))


def _numbers(taken: list[Batch]) -> list[int]:
    return [int(picture[0, 0, 0]) for batch in taken for picture in batch.pictures]


def _joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _equal(one: Batch, other: Batch) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_together_see_every_picture_once_an_epoch(dataset, world_size: int) -> None:
    steps = 2 * NUM_PICTURES // BATCH + 1
    of_worker = [
        _take(dataset, steps, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    seen = _numbers([batch for step in zip(*of_worker, strict=True) for batch in step])
    assert sorted(seen[:NUM_PICTURES]) == list(range(NUM_PICTURES))
    assert sorted(seen[NUM_PICTURES : 2 * NUM_PICTURES]) == list(range(NUM_PICTURES))
    assert seen[:NUM_PICTURES] != seen[NUM_PICTURES : 2 * NUM_PICTURES]


@pytest.mark.parametrize("steps", [1, 5, 13])  # within an epoch, at its end, in the third
@pytest.mark.parametrize("world_size", [1, 3])
def test_going_on_with_another_number_of_workers_changes_nothing(
    dataset, steps: int, world_size: int
) -> None:
    whole = _take(dataset, steps + 3)
    rest = [
        _take(dataset, 3, rank=rank, world_size=world_size, first=steps * BATCH)
        for rank in range(world_size)
    ]
    for expected, parts in zip(whole[steps:], zip(*rest, strict=True), strict=True):
        assert _equal(expected, _joined(list(parts)))


def test_threads_and_places_change_nothing(make_dataset, tmp_path) -> None:
    local, remote = make_dataset(str(tmp_path / "set")), make_dataset(f"memory://{tmp_path.name}")
    expected = _take(local, 8)
    for taken in (_take(local, 8, num_threads=3), _take(remote, 8, num_threads=2)):
        assert all(map(_equal, expected, taken))


def test_a_picture_comes_with_one_of_its_captions_or_none(dataset) -> None:
    table = dataset.read("train", ["image_id", TEXT, TEXT_LENGTHS])
    texts = {
        number: [torch.from_numpy(text_of(row, k).copy()) for k in range(5)]
        for number, row in zip(table["image_id"].to_pylist(), text_rows(table), strict=True)
    }
    chosen = []
    for batch in _take(dataset, 30, text_dropout=0.25):
        for number, text, mask in zip(_numbers([batch]), batch.text, batch.text_mask, strict=True):
            length = int(mask.sum())
            assert mask[:length].all()
            assert not text[length:].any()
            equal = [k for k, own in enumerate(texts[number]) if torch.equal(own, text[:length])]
            assert len(equal) == (length > 0)
            chosen += equal or [None]
    counts = [chosen.count(k) for k in (None, *range(5))]
    assert sum(counts) == 30 * BATCH
    assert 0.18 < counts[0] / len(chosen) < 0.32
    assert min(counts[1:]) > 0.08 * len(chosen)


@pytest.mark.parametrize(("text_dropout", "expected"), [(0.0, 0), (1.0, 2 * BATCH)])
def test_text_may_always_or_never_be_left_out(dataset, text_dropout: float, expected: int) -> None:
    masks = torch.cat([batch.text_mask for batch in _take(dataset, 2, text_dropout=text_dropout)])
    assert int((~masks.any(dim=1)).sum()) == expected


def test_captions_are_chosen_evenly() -> None:
    draws = [(k + 0.5) / 6000 for k in range(6000)]
    chosen = [choose(draw, 5, 1 / 6) for draw in draws]
    assert [chosen.count(k) for k in (None, *range(5))] == [1000] * 6
    largest = 1 - 2**-53
    assert [choose(largest, n, 0.1) for n in (1, 3, 5)] == [0, 2, 4]


@pytest.fixture
def only_new_objects():
    """The garbage collector lists what is made from now on, not the million objects of all modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 1)])
def test_what_comes_next_is_read_unasked_and_nothing_else_is_held(
    dataset, only_new_objects, monkeypatch, world_size: int, rank: int
) -> None:
    """So a model does not wait for what could have been ready, and memory does not grow with the dataset."""
    monkeypatch.setattr(loader, "READ_AHEAD", READ_AHEAD)
    groups = dataset.row_groups("train")
    order = Order([group.num_rows for group in groups], seed=5, batch_size=BATCH)
    local = BATCH // world_size
    with closing(batches(dataset, "train", _share(world_size=world_size, rank=rank))) as stream:
        for number, _ in enumerate(itertools.islice(stream, 12)):
            first = (
                number + 1 + DECODE_AHEAD
            )  # the batches before are decoded: their groups are gone
            coming = {
                tuple(place)
                for step in range(first, first + READ_AHEAD // local)
                for place in order.take(step * BATCH + rank * local, local)[:, :2].tolist()
            }
            # A group is there once for each epoch that needs it, with this epoch's captions.
            expected = sorted(groups[group] for _, group in coming)
            _wait_until(lambda expected=expected: sorted(_held()) == expected)


def _held() -> list:
    return [found.source for found in gc.get_objects() if type(found) is Group]


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, _held()
        time.sleep(0.01)


def _cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _drop_a_row(path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path, row_group_size=4)


def _spoil_a_picture(path) -> None:
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[0]["bytes"] = images[0]["bytes"][:60]
    column = table.schema.get_field_index("image")
    changed = table.set_column(column, table.schema.field("image"), [images])
    pq.write_table(changed, path, row_group_size=4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cannot be read: .*magic bytes"),
        (lambda path: flip_a_picture(path, 1), "row group 1 cannot be read: .*CRC"),
        (lambda path: path.write_bytes(b""), "cannot be read: .*"),
        (lambda path: path.unlink(), "cannot be read: .*No such file"),
        (_drop_a_row, "row group 3 has 3 rows, and manifest.json says 4"),
        (_spoil_a_picture, "the picture of row 0 in row group 0 cannot be decoded: "),
    ],
)
def test_a_damaged_file_is_named(dataset, tmp_path, damage, message: str) -> None:
    path = tmp_path / "set/train/00002.parquet"
    damage(path)
    with pytest.raises(UserError, match=f"train/00002.parquet: .*{message}"):
        _take(dataset, 2 * NUM_PICTURES // BATCH)
