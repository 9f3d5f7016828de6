"""`layered inspect` tells what a dataset holds, and a check finds whatever is wrong with it."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import cli, inspection, prepare
from pipelines.dataset import PreparedDataset
from tests.pipelines.conftest import flip_a_picture


@pytest.fixture
def dataset(prepared):
    return prepared


def inspect(dataset, *arguments: str) -> int:
    return cli.main(["inspect", str(dataset), *arguments])


def change(path, name: str, make) -> None:
    """Puts other values into a column of a file."""
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    values = pa.array(make(table[name].to_pylist()), field.type)
    pq.write_table(table.set_column(place, field, values), path)


def test_shows_counts_reasons_lengths_and_pictures(dataset, tmp_path, capsys) -> None:
    sheet = tmp_path / "sheet.png"
    assert inspect(dataset, "--sheet", str(sheet), "--num-images", "6") == 0
    shown = capsys.readouterr().out
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["fingerprint"] in shown
    assert "64 x 64, png, crop center" in shown
    counts = manifest["splits"]["train"]["counts"]
    (line,) = (line for line in shown.splitlines() if line.startswith("train  "))
    assert line.split()[1:7] == [str(count) for count in counts.values()]
    assert "1 x read: FileNotFoundError: No such file or directory" in shown
    lengths = [
        line.split() for line in shown.partition("by tokens\n")[2].splitlines() if "#" in line
    ]
    total = sum(int(length) * int(count) for length, count, _ in lengths)
    assert total == sum(split["counts"]["tokens"] for split in manifest["splits"].values())
    with Image.open(sheet) as picture:
        assert np.asarray(picture).std() > 10
    assert f"pictures: {sheet}" in shown


def test_without_text_lengths_are_of_words(configure, without_ray, tmp_path, capsys) -> None:
    prepare.run(configure("text.encoder=none", "data.image_format=jpeg"))
    assert inspect(tmp_path / "dataset", "--no-sheet", "--check") == 0
    shown = capsys.readouterr().out
    assert "text      not encoded" in shown
    assert "jpeg of quality" in shown
    assert "captions by words" in shown
    assert not list(tmp_path.glob("*.png"))


def test_a_sound_dataset_is_sound(dataset, capsys) -> None:
    assert inspect(dataset, "--no-sheet", "--check") == 0
    assert "checked: sound" in capsys.readouterr().out


def _another_manifest(path, **counts: int) -> None:
    tree = json.loads(path.read_text())
    tree["splits"]["train"]["counts"] |= counts
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train/00000.parquet", lambda path: path.unlink(), "No such file"),
        ("train/00000.parquet", lambda path: path.write_bytes(path.read_bytes()[:-1]), "magic"),
        (
            "train/00000.parquet",
            lambda path: flip_a_picture(path, 0),
            "row group 0 cannot be read: .*CRC",
        ),
        (
            "train/00000.parquet",
            lambda path: pq.write_table(pq.read_table(path).slice(1), path),
            "rows, and manifest.json says",
        ),
        (
            "train/00000.parquet",
            lambda path: change(path, "image", lambda old: [{"bytes": b"?"}, *old[1:]]),
            "image_id [0-9]+: the picture cannot be decoded",
        ),
        (
            "train/00000.parquet",
            lambda path: change(path, "text", lambda old: [old[0][:-1], *old[1:]]),
            "image_id [0-9]+: [0-9]+ numbers of text for [0-9]+ tokens",
        ),
        (
            "train/00000.parquet",
            lambda path: change(path, "text", lambda old: [[np.nan, *old[0][1:]], *old[1:]]),
            "image_id [0-9]+: text that is not finite",
        ),
        (
            "train/00000.parquet",
            lambda path: change(path, "captions", lambda old: [[*old[0], "more"], *old[1:]]),
            "image_id [0-9]+: [0-9]+ captions, and lengths of [0-9]+",
        ),
        (
            "train/00000.parquet",
            lambda path: change(path, "image_id", lambda old: [old[-1], *old[1:]]),
            "train: 1 rows with the image_id of another",
        ),
        (
            "train/00000.parquet",
            lambda path: pq.write_table(pq.read_table(path).drop_columns("width"), path),
            "other columns than those of the format",
        ),
        (
            "train/00000.parquet",
            lambda path: pq.write_table(pq.read_table(path).replace_schema_metadata(), path),
            "fingerprint None, not the dataset's",
        ),
        ("train/99999.parquet", lambda path: path.touch(), "train/99999.parquet: not in manifest"),
        ("null_text.npy", lambda path: path.write_bytes(b""), "null_text.npy: "),
        (
            "null_text.npy",
            lambda path: np.save(path, np.zeros((2, 3), np.float16)),
            r"null_text.npy: float16 \[2, 3\], not",
        ),
        (
            "manifest.json",
            lambda path: _another_manifest(path, captions=7),
            "train: [0-9]+ captions, and manifest.json says 7",
        ),
        (
            "manifest.json",
            lambda path: _another_manifest(path, rejects=5),
            "train: 6 rejects, and manifest.json says 5",
        ),
        (
            "manifest.json",
            lambda path: path.write_text(path.read_text().replace('"center"', '"random"')),
            "the fingerprint is not that of the settings",
        ),
    ],
)
def test_a_check_finds_what_is_wrong(dataset, capsys, file, damage, message) -> None:
    damage(dataset / file)
    problems = inspection.check(PreparedDataset.open(str(dataset)))
    assert any(re.search(message, problem) for problem in problems), problems


def test_what_is_wrong_is_an_exit_code(dataset, capsys) -> None:
    (dataset / "null_text.npy").unlink()
    assert inspect(dataset, "--no-sheet", "--check") == 1
    assert "checked: 1 problems" in capsys.readouterr().out


def test_a_check_tells_of_every_file_that_cannot_be_read(dataset, capsys) -> None:
    train = dataset / "train" / "00000.parquet"
    train.write_bytes(train.read_bytes()[:-100])
    shutil.rmtree(dataset / "val")
    assert inspect(dataset, "--check") == 1
    told = capsys.readouterr().out
    assert "train/00000.parquet: " in told
    assert "val/00000.parquet: " in told
    assert inspect(dataset) == 2
    assert "; --check looks at all files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "holds no finished dataset"), (["x", "--num-images", "0"], "at least 1")],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err
