import json

import pytest

from pipelines.annotations import Entry
from pipelines.errors import UserError
from pipelines.sources import CocoCaptions


def write(path, images, captions):
    tree = {
        "images": [{"id": number, "file_name": name} for number, name in images],
        "annotations": [
            {"id": number, "image_id": image_id, "caption": caption}
            for number, (image_id, caption) in enumerate(captions)
        ],
    }
    path.write_text(json.dumps(tree))
    return str(path)


def read(path):
    source = CocoCaptions(path=str(path), images="images", key="data.train_annotations")
    found = source.listing()
    entries = [
        Entry(**{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()})
        for row in found.entries.to_pylist()
    ]
    return found, {entry.image_id: entry for entry in entries if "again" not in str(entry.error)}


def test_captions_are_grouped_by_image_in_the_files_order(tmp_path):
    path = write(
        tmp_path / "a.json", [(7, "7.jpg"), (3, "3.jpg")], [(3, "b"), (7, "c"), (3, " a\n cat ")]
    )
    _, entries = read(path)
    assert entries[3].captions == ("b", "a cat")
    assert entries[3].caption_ids == (0, 2)
    assert entries[7].captions == ("c",)
    assert entries[7].error is None


def test_every_picture_becomes_one_entry(tmp_path):
    path = write(
        tmp_path / "a.json",
        [(1, "1.jpg"), (2, "2.jpg"), (1, "again.jpg"), (3, "3.jpg"), (4, "4.jpg")],
        [(1, "x"), (3, " "), (4, ""), (4, "y"), (99, "nobody's")],
    )
    found, entries = read(path)
    assert found.num_images == 5
    assert found.num_strays == 1
    assert entries[1].file_name == "1.jpg"
    assert entries[2].error == "it has no caption"
    assert entries[3].error == "all of its captions are empty"
    assert (entries[4].captions, entries[4].num_empty) == (("y",), 1)
    (again,) = [row for row in found.entries.to_pylist() if "again" in (row["error"] or "")]
    assert (again["image_id"], again["file_name"], again["captions"]) == (1, "again.jpg", [])


def test_order_depends_on_the_ids_alone(tmp_path):
    images = [(number, f"{number}.jpg") for number in range(200)]
    captions = [(number, "x") for number in range(200)]
    one, _ = read(write(tmp_path / "a.json", images, captions))
    two, _ = read(write(tmp_path / "b.json", images[::-1], captions))
    order = one.entries.column("image_id").to_pylist()
    assert order == two.entries.column("image_id").to_pylist()
    assert order != sorted(order)
    assert sorted(order) == list(range(200))


def test_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"data.train_annotations='.*none.json': No such file"):
        read(tmp_path / "none.json")


def test_truncated_json_is_told(tmp_path):
    path = write(tmp_path / "a.json", [(1, "1.jpg")], [(1, "x")])
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not whole JSON"):
        read(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "must be an object with the lists images and annotations"),
        ({"images": []}, "must be an object with the lists images and annotations"),
        (
            {"images": [{"id": "x", "file_name": "x"}], "annotations": []},
            r"images\[0\].id='x' must be an integer",
        ),
        (
            {"images": [{"id": 1}], "annotations": []},
            r"images\[0\].file_name=None must be a text",
        ),
        (
            {"images": [], "annotations": [{"id": 1, "image_id": 1, "bbox": []}]},
            r"annotations\[0\].caption=None must be a text, as in COCO's captions files",
        ),
    ],
)
def test_another_form_is_told(tmp_path, tree, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        read(path)
