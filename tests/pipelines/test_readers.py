"""Programs that know nothing of this project read a picture and its caption."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def split(prepared) -> Path:
    """The training split of a prepared dataset of several files."""
    return prepared / "train"


def check(image: dict, captions: list[str], text, lengths) -> None:
    """That of picture 1 is all there."""
    with Image.open(io.BytesIO(image["bytes"])) as picture:
        assert picture.convert("RGB").size == (64, 64)
    assert image["path"] == "good.jpg"
    assert list(captions) == ["a cat", "a dog", "a cat", "two birds", "a red bus"]
    tokens = np.asarray(text, dtype=np.float16).reshape(-1, 4)
    assert len(tokens) == sum(lengths) == 16
    assert tokens[0].tolist() == [97, 97, 97, 97]


def test_pyarrow(split):
    import pyarrow.dataset

    rows = pyarrow.dataset.dataset(split).to_table(filter=pyarrow.compute.field("image_id") == 1)
    (row,) = rows.to_pylist()
    check(row["image"], row["captions"], row["text"], row["text_lengths"])
    assert json.loads(rows.schema.metadata[b"layered"])["text_width"] == 4


def test_pandas(split):
    import pandas

    frame = pandas.read_parquet(split).set_index("image_id")
    assert len(frame) == 8
    row = frame.loc[1]
    check(row["image"], row["captions"], row["text"], row["text_lengths"])


def test_duckdb(split):
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"from '{split}/*.parquet' select image, captions, text, text_lengths where image_id = 1"
    )
    ((image, captions, text, lengths),) = duckdb.sql(query).fetchall()
    check(image, captions, text, lengths)
    ((count,),) = duckdb.sql(
        f"select count(*) from '{split}/*.parquet' where captions[1] = 'printed'"
    ).fetchall()
    assert count == 1


def test_polars(split):
    polars = pytest.importorskip("polars")
    frame = polars.scan_parquet(split / "*.parquet").filter(polars.col("image_id") == 1).collect()
    (row,) = frame.to_dicts()
    check(row["image"], row["captions"], row["text"], row["text_lengths"])


def test_hugging_face_datasets(split, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = {"train": str(split / "*.parquet")}
    loaded = datasets.load_dataset(
        "parquet", data_files=files, cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert len(loaded) == 8
    (row,) = (row for row in loaded if row["image_id"] == 1)
    assert isinstance(row["image"], Image.Image)
    assert row["image"].size == (64, 64)
    raw = loaded.cast_column("image", datasets.Image(decode=False))
    (image,) = (row["image"] for row in raw if row["image_id"] == 1)
    check(image, row["captions"], row["text"], row["text_lengths"])
