import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import prepare, schema
from pipelines.config import UserError
from pipelines.dataset import (
    PreparedDataset,
    decode_rows,
    pixels,
    read_row_group,
    text_of,
    text_rows,
)
from pipelines.pictures import crop_square, decode
from tests.pipelines.conftest import pixels as numbered


@pytest.fixture
def dataset(prepared):
    return PreparedDataset.open(str(prepared))


def test_pixels_are_those_of_the_source(dataset, coco):
    table = dataset.read("val", ["file_name", "image"])
    decoded = decode_rows(table)
    assert decoded.shape == (5, 64, 64, 3)
    assert decoded.dtype == np.uint8
    for name, picture in zip(table.column("file_name").to_pylist(), decoded, strict=True):
        source = crop_square(decode((coco / "val" / name).read_bytes()), 64)
        assert np.array_equal(picture, np.asarray(source))


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_has_pillows_pixels(mode, options):
    buffer = io.BytesIO()
    Image.fromarray(numbered(7)).convert(mode).save(buffer, "jpeg", quality=90, **options)
    with Image.open(buffer) as picture:
        expected = np.asarray(picture.convert("RGB"))
    encoded = pa.py_buffer(buffer.getvalue())
    assert np.array_equal(pixels(encoded), expected)
    out = np.zeros((2, *expected.shape), np.uint8)
    pixels(encoded, out=out[1])
    assert np.array_equal(out[1], expected)
    assert not out[0].any()
    with pytest.raises(ValueError, match="JPEG"):  # not half a picture
        pixels(pa.py_buffer(buffer.getvalue()[:-200]))


@pytest.mark.parametrize("image_format", ["jpeg", "png"])
@pytest.mark.parametrize("height", [47, 49])
def test_a_picture_of_another_size_is_no_part_of_a_batch(image_format, height):
    buffer = io.BytesIO()
    Image.fromarray(numbered(7)).save(buffer, image_format)
    with pytest.raises(ValueError, match=r"80 x 48|too small"):
        pixels(pa.py_buffer(buffer.getvalue()), out=np.zeros((height, 80, 3), np.uint8))


def test_text_is_that_of_the_caption(dataset, embed):
    for split in ("train", "val"):
        table = dataset.read(split, ["captions", "text", "text_lengths"])
        rows = list(text_rows(table))
        for row, captions in zip(rows, table.column("captions").to_pylist(), strict=True):
            assert len(row["text_lengths"]) == len(captions)
            for index, caption in enumerate(captions):
                assert np.array_equal(text_of(row, index), embed(caption))
    assert np.array_equal(dataset.null_text, embed(""))


def test_text_rows_are_read_as_lists_too(dataset, embed):
    row = dataset.read("val", ["captions", "text", "text_lengths"], [3]).to_pylist()[0]
    assert np.array_equal(text_of(row, 0), embed(row["captions"][0]))


@pytest.mark.parametrize("rows", [[4, 0, 4, 2], [1], []])
def test_rows_come_in_the_order_asked_for(dataset, rows):
    every = dataset.read("val", ["image_id", "captions"])
    assert dataset.read("val", ["image_id", "captions"], rows).equals(
        every.take(pa.array(rows, pa.int64()))
    )


def test_row_numbers_out_of_range_are_refused(dataset):
    for row in (-1, 5):
        with pytest.raises(IndexError, match="val has 5 rows"):
            dataset.read("val", ["image_id"], [row])


def test_row_groups_are_a_partition(dataset, monkeypatch):
    for split in ("train", "val"):
        groups = dataset.row_groups(split)
        assert sum(group.num_rows for group in groups) == dataset.num_images(split)
        read = pa.concat_tables([read_row_group(group, ["image_id"]) for group in groups])
        assert read.equals(dataset.read(split, ["image_id"]))


def test_files_with_many_row_groups_are_read_alike(configure, without_ray, monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "ROWS_PER_GROUP", 2)
    prepare.run(configure())
    dataset = PreparedDataset.open(str(tmp_path / "dataset"))
    assert [group.num_rows for group in dataset.row_groups("val")] == [2, 2, 1]
    assert [group.row_group for group in dataset.row_groups("val")] == [0, 1, 0]
    every = dataset.read("val", ["image_id"])
    assert dataset.read("val", ["image_id"], [3, 0]).equals(every.take([3, 0]))


def test_an_object_store_serves_as_well(configure, without_ray, tmp_path):
    path = f"memory://{tmp_path.name}"
    prepare.run(configure(f"dataset={path}"))
    prepare.run(configure())
    remote, local = (PreparedDataset.open(p) for p in (path, str(tmp_path / "dataset")))
    columns = ["image_id", "image", "text"]
    assert remote.read("train", columns).equals(local.read("train", columns))
    assert np.array_equal(remote.null_text, local.null_text)


def test_missing_and_foreign_datasets_are_told(tmp_path):
    with pytest.raises(UserError, match="holds no finished dataset"):
        PreparedDataset.open(str(tmp_path / "none"))
    for text, message in (
        ("[]", "not a manifest"),
        ('{"settings": {"version": 99}}', "format version 99; this program reads 1"),
        ("{", "manifest.json"),
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            PreparedDataset.open(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text.encoder=t5-small", "text.encoder: the configuration wants 't5-small', but .* with "),
        ("text.max_tokens=13", "text.max_tokens: the configuration wants 13, but .* with 12"),
        ("model.text_width=5", "model.text_width: the configuration wants 5, but .* with 4"),
        (
            "model.resolutions=[12,24,48]",
            "model.resolutions: the configuration wants 48, or a multiple of it, but .* 64",
        ),
    ],
)
def test_a_dataset_for_another_model_is_refused(dataset, configure, override, message):
    dataset.check_matches(configure())
    with pytest.raises(UserError, match=message):
        dataset.check_matches(configure(override))


def test_a_smaller_model_may_use_it_where_the_ratio_is_whole(dataset, configure):
    dataset.check_matches(configure("model.resolutions=[8,16,32]"))


def test_plain_pyarrow_reads_it(dataset):
    """As docs/dataset.md says, in a process that has neither Ray nor this project."""
    code = """
import json, sys
import numpy as np, pyarrow.parquet as pq
row = pq.read_table(sys.argv[1]).slice(0, 1).to_pylist()[0]
width = json.loads(pq.read_schema(sys.argv[1]).metadata[b"layered"])["text_width"]
tokens = np.array(row["text"], dtype=np.float16).reshape(-1, width)
first = tokens[: row["text_lengths"][0]]
assert row["image"]["bytes"][:4] == b"\\x89PNG"
assert len(tokens) == sum(row["text_lengths"]) and len(first) == len(row["captions"][0].split()) + 1
assert not {"ray", "torch", "pipelines"} & set(sys.modules)
"""
    path = dataset.row_groups("val")[0].path
    subprocess.run([sys.executable, "-I", "-c", code, path], check=True)


def test_the_schema_declares_an_image_to_hugging_face(dataset):
    found = pq.read_schema(dataset.row_groups("val")[0].path)
    features = json.loads(found.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == found.names
    assert features["image"] == {"_type": "Image"}
    assert found.field("text").type.value_type == pa.float16()


def test_the_manifest_survives_a_round_trip(dataset):
    again = schema.Manifest.from_json(dataset.manifest.to_json())
    assert again == dataset.manifest
