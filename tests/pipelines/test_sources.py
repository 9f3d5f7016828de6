"""Each kind of source lists every picture once and reads its bytes; local and in an object store."""

import json
import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import prepare, storage
from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.sources import CocoCaptions, ParquetRows, TextFiles, open_source

PICTURES = {"a.jpg": b"A", "sub/b.PNG": b"B", "c.webp": b"C", "d.jpg": b"D", "e.jpg": b"E"}
TEXTS = {
    "a.txt": b"a cat\na  dog\n",
    "sub/b.txt": b"\xef\xbb\xbfa bird\n\n",
    "c.txt": b"\xff\xfe",
    "d.txt": b"",
    "notes.md": b"not one of them",
}


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def write(folder: str, files: dict[str, bytes]) -> None:
    filesystem, root = fsspec.core.url_to_fs(folder)
    for name, content in files.items():
        filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{root}/{name}", content)


def rows_of(source) -> dict[str, dict]:
    return {row["file_name"]: row for row in source.listing().entries.to_pylist()}


def contents(source) -> dict[str, bytes | OSError]:
    entries = source.listing().entries.to_pylist()
    return {entries[index]["file_name"]: content for index, content in source.read(entries)}


def data(*overrides: str):
    names = [
        f"data.{split}_{kind}=null" for split in ("val",) for kind in ("annotations", "images")
    ]
    return load_config("demo", [*names, *overrides]).data


def table(**columns: object) -> pa.Table:
    return pa.table(columns)


def write_parquet(path: Path, columns: pa.Table, rows_per_group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns, path, row_group_size=rows_per_group)


def parquet(*paths: Path, **changes: object) -> ParquetRows:
    options = {
        "images": None,
        "image_column": "image",
        "caption_column": "captions",
        "id_column": "image_id",
        "key": "data.train_annotations",
    }
    return ParquetRows(files=tuple(map(str, paths)), **options | changes)


def test_a_folder_of_pictures_has_captions_in_text_files(place):
    write(place, PICTURES | TEXTS)
    source = TextFiles(images=place, key="data.train_images")
    rows = rows_of(source)
    assert set(rows) == set(PICTURES)
    assert rows["a.jpg"]["captions"] == ["a cat", "a dog"]
    assert (rows["sub/b.PNG"]["captions"], rows["sub/b.PNG"]["num_empty"]) == (["a bird"], 1)
    errors = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert errors == {
        "c.webp": "its .txt is not UTF-8",
        "d.jpg": "it has no caption",
        "e.jpg": "it has no .txt beside it",
    }
    assert len({number for row in rows.values() for number in row["caption_ids"]}) == 3
    assert contents(source) == PICTURES


def test_ids_of_files_depend_on_their_names_alone(tmp_path):
    write(str(tmp_path), PICTURES | TEXTS)
    source = TextFiles(images=str(tmp_path), key="data.train_images")
    before, digest = rows_of(source), source.listing().sha256
    write(str(tmp_path), {"0.jpg": b"new", "0.txt": b"another"})
    after = rows_of(source)
    assert {name: after[name]["image_id"] for name in before} == {
        name: row["image_id"] for name, row in before.items()
    }
    assert source.listing().sha256 != digest


def test_a_changed_caption_changes_the_fingerprint(tmp_path):
    write(str(tmp_path), PICTURES | TEXTS)
    source = TextFiles(images=str(tmp_path), key="data.train_images")
    digest = source.listing().sha256
    assert source.listing().sha256 == digest
    write(str(tmp_path), {"a.txt": b"a cat\na frog\n"})
    assert source.listing().sha256 != digest


def test_files_that_are_gone_are_told_one_by_one(place):
    write(place, {"a.jpg": b"A", "a.json": json.dumps(
        {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
            "annotations": [
                {"id": 1, "image_id": number, "caption": "x"} for number in (1, 2)
            ],
        }
    ).encode()})  # fmt: skip
    found = contents(CocoCaptions(path=f"{place}/a.json", images=place, key="key"))
    assert found["a.jpg"] == b"A"
    assert isinstance(found["gone.jpg"], FileNotFoundError)
    assert found["gone.jpg"].strerror == "No such file or directory"


STRUCTS = [{"bytes": b"A", "path": "a.jpg"}, {"bytes": b"B", "path": None}, None]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (STRUCTS, {"a.jpg": b"A", "1.parquet:0:1": b"B", "1.parquet:1:0": None}),
        ([b"A", b"B", None], {"1.parquet:0:0": b"A", "1.parquet:0:1": b"B", "1.parquet:1:0": None}),
        (["a.jpg", "sub/b.PNG", "none.jpg"], {"a.jpg": b"A", "sub/b.PNG": b"B", "none.jpg": None}),
        (
            [{"path": "a.jpg"}, {"path": "d.jpg"}, {"path": "none.jpg"}],
            {"a.jpg": b"A", "d.jpg": b"D", "none.jpg": None},
        ),
    ],
)
def test_pictures_of_parquet_rows_are_bytes_or_names(tmp_path, images, expected):
    write(str(tmp_path), PICTURES)
    columns = table(image_id=[3, 4, 5], image=images, captions=["one", "two", None])
    write_parquet(tmp_path / "1.parquet", columns)
    source = parquet(tmp_path / "1.parquet", images=str(tmp_path))
    rows, found = rows_of(source), contents(source)
    assert set(rows) == set(expected)
    assert sorted(row["image_id"] for row in rows.values()) == [3, 4, 5]
    for name, content in expected.items():
        if content is None:
            assert isinstance(found[name], FileNotFoundError)
            assert rows[name]["error"] == "it has no caption"
        else:
            assert found[name] == content


def test_captions_of_parquet_rows_are_a_text_or_a_list(tmp_path):
    lists = table(image=[b"A", b"B"], sentences=[["x", "", " y  z"], []])
    texts = table(image=[b"C"], sentences=["one"])
    write_parquet(tmp_path / "1.parquet", lists)
    write_parquet(tmp_path / "2.parquet", texts)
    options = {"caption_column": "sentences", "id_column": None}
    source = parquet(tmp_path / "1.parquet", tmp_path / "2.parquet", **options)
    rows = sorted(rows_of(source).values(), key=lambda row: row["image_id"])
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert [row["captions"] for row in rows] == [["x", "y z"], [], ["one"]]
    assert [row["caption_ids"] for row in rows] == [[0, 2], [], [3]]
    assert rows[0]["num_empty"] == 1


def test_rows_of_one_group_stay_together_and_are_read_once(tmp_path, monkeypatch):
    size, group = 300, 30
    names = [str(number).encode() for number in range(size)]
    columns = table(image_id=list(range(size)), image=names, captions=["x"] * size)
    write_parquet(tmp_path / "1.parquet", columns, group)
    source = parquet(tmp_path / "1.parquet")
    entries = source.listing().entries.to_pylist()
    groups = [entry["place"][1] for entry in entries]
    starts = groups[::group]
    assert groups == [number for number in starts for _ in range(group)]
    assert sorted(starts) == list(range(size // group))
    assert starts != sorted(starts)
    opened, really_open = [], storage.open_input
    monkeypatch.setattr(
        storage, "open_input", lambda path: opened.append(path) or really_open(path)
    )
    some = [entry for entry in entries[:45] if entry["image_id"] % 3]
    found = {some[index]["image_id"]: content for index, content in source.read(some)}
    assert found == {entry["image_id"]: str(entry["image_id"]).encode() for entry in some}
    assert len(opened) == 2


def test_a_picture_listed_twice_is_kept_once(tmp_path):
    columns = table(image_id=[7, 7], image=[b"A", b"B"], captions=["x", "y"])
    write_parquet(tmp_path / "1.parquet", columns)
    rows = rows_of(parquet(tmp_path / "1.parquet"))
    assert rows["1.parquet:0:0"]["error"] is None
    assert "appears again" in rows["1.parquet:0:1"]["error"]


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"jpg": [b"A"]}, {}, r"data.image_column='image': .* has no such column; it has captions"),
        ({"image": [3]}, {}, r"data.image_column='image': .* has int64 there, not bytes"),
        ({"image": [{"x": 3}]}, {}, r"data.image_column='image': .* has struct<x: int64> there"),
        ({"image": [b"A"], "captions": [3]}, {}, r"data.caption_column='captions': .* int64 there"),
        (
            {"image": [b"A"]},
            {"id_column": "captions"},
            r"data.id_column='captions': .* not integer",
        ),
        (
            {"image": [b"A"], "image_id": [None]},
            {},
            r"data.id_column='image_id': .* has null there",
        ),
    ],
)
def test_columns_of_another_kind_are_told(tmp_path, columns, changes, message):
    columns = {"captions": ["x"], "image_id": [1]} | columns
    write_parquet(tmp_path / "1.parquet", table(**columns))
    with pytest.raises(UserError, match=message):
        parquet(tmp_path / "1.parquet", **changes).listing()


def test_rows_without_an_id_are_told(tmp_path):
    columns = table(image_id=[1, None], image=[b"A", b"B"], captions=["x", "y"])
    write_parquet(tmp_path / "1.parquet", columns)
    with pytest.raises(UserError, match="has a row without one"):
        parquet(tmp_path / "1.parquet").listing()


def test_the_configuration_chooses_the_source(tmp_path, place):
    write(place, PICTURES | TEXTS | {"a.json": b"{}", "p/1.parquet": b"", "p/2.parquet": b""})
    null = "data.train_annotations=null"
    images = f"data.train_images={place}"
    assert isinstance(open_source(data(null, images), "train"), TextFiles)
    json_file = f"data.train_annotations={place}/a.json"
    assert isinstance(open_source(data(json_file, images), "train"), CocoCaptions)
    for name, files in (("p", ("1.parquet", "2.parquet")), ("p/2.parquet", ("2.parquet",))):
        chosen = data(f"data.train_annotations={place}/{name}", "data.train_images=null")
        source = open_source(chosen, "train")
        assert isinstance(source, ParquetRows)
        assert [path.rpartition("/")[2] for path in source.files] == list(files)
    assert open_source(data(null, images), "val") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train_annotations=/none/a.txt"],
            r"data.train_annotations='/none/a.txt': .* \.json",
        ),
        (["data.train_annotations=/none.parquet"], r"'/none.parquet': there is no such file"),
        (["data.train_images=null"], r"data.train_images=None: .* give their folder"),
        (["data.train_annotations=null", "data.train_images=/none"], "there is no such folder"),
    ],
)
def test_sources_that_are_not_there_are_told(overrides, message):
    with pytest.raises(UserError, match=message):
        open_source(data(*overrides), "train")


def test_no_source_at_all_is_told():
    with pytest.raises(UserError, match=r"data\.train_annotations=None must be given"):
        data("data.train_annotations=null", "data.train_images=null")


def test_a_folder_without_pictures_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        TextFiles(images=str(tmp_path), key="data.train_images").listing()


def no_val(configure, *overrides: str):
    val = ("data.val_annotations=null", "data.val_images=null")
    return configure(*val, *overrides)


def test_our_own_files_can_be_prepared_again(configure, without_ray, tmp_path):
    """Rows, captions and their ids stay; and pictures of the wanted size and kind keep their bytes."""
    prepare.run(no_val(configure, "data.image_format=jpeg"))
    again = no_val(
        configure,
        f"data.train_annotations={tmp_path / 'dataset' / 'train'}",
        "data.train_images=null",
        "data.image_format=jpeg",
        f"dataset={tmp_path / 'again'}",
    )
    manifest = prepare.run(again)
    assert manifest.splits["train"].counts.rejects == 0
    first, second = (
        {
            row["image_id"]: {name: row[name] for name in ("captions", "caption_ids", "image")}
            for path in (tmp_path / name / "train").glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for name in ("dataset", "again")
    )
    assert second == first


def test_the_same_pictures_give_the_same_rows_from_every_source(
    coco, configure, without_ray, tmp_path
):
    folder = shutil.copytree(coco / "val", tmp_path / "folder")
    tree = json.loads((coco / "captions_val.json").read_text())
    captions = {a["image_id"]: a["caption"] for a in tree["annotations"]}
    for image in tree["images"]:
        (folder / image["file_name"]).with_suffix(".txt").write_text(captions[image["id"]])
    columns = table(
        image=[(folder / image["file_name"]).read_bytes() for image in tree["images"]],
        captions=[captions[image["id"]] for image in tree["images"]],
    )
    write_parquet(tmp_path / "rows.parquet", columns)
    sources = {
        "coco": (f"{coco / 'captions_val.json'}", f"{coco / 'val'}"),
        "text": ("null", f"{folder}"),
        "rows": (f"{tmp_path / 'rows.parquet'}", "null"),
    }
    found = {}
    for name, (listed, images) in sources.items():
        overrides = [f"data.train_annotations={listed}", f"data.train_images={images}"]
        prepare.run(
            no_val(configure, *overrides, f"dataset={tmp_path / name}", "data.id_column=null")
        )
        rows = pq.read_table(tmp_path / name / "train").to_pylist()
        found[name] = sorted((row["captions"], row["image"]["bytes"], row["text"]) for row in rows)
    assert len(found["coco"]) == 5
    assert found["coco"] == found["text"] == found["rows"]
