import collections
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.emoji import render

HERE = Path(render.__file__).parent


def load(split):
    tree = json.loads((HERE / "annotations" / f"captions_{split}.json").read_text())
    captions = collections.defaultdict(list)
    for annotation in tree["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return tree, captions


@pytest.fixture(scope="module")
def splits():
    return {split: load(split) for split in ("train", "val")}


def background_of(caption):
    words = caption.replace(",", "").split()
    assert words[-1] == "background"
    return words[-2]


def test_every_picture_is_there_and_has_captions(splits):
    for split, (tree, captions) in splits.items():
        names = {image["file_name"] for image in tree["images"]}
        assert names == {path.name for path in (HERE / split).iterdir()}
        assert {image["id"] for image in tree["images"]} == set(captions)
        assert all(len(set(texts)) == 3 for texts in captions.values())
        assert len({annotation["id"] for annotation in tree["annotations"]}) == len(
            tree["annotations"]
        )


def test_the_small_files_hold_every_fifth_object_with_the_same_captions(splits):
    objects = {}
    for split, (tree, _) in splits.items():
        small, _ = load(f"{split}_small")
        assert 5 * len(small["images"]) == len(tree["images"])
        for key in ("images", "annotations"):
            assert all(entry in tree[key] for entry in small[key])
        objects[split] = {(image["id"] - 1) // len(render.BACKGROUNDS) for image in small["images"]}
    assert objects["train"] == objects["val"]


def test_the_form_is_cocos(splits):
    for tree, _ in splits.values():
        assert set(tree) == {"info", "images", "licenses", "annotations"}
        assert {
            "license",
            "file_name",
            "coco_url",
            "height",
            "width",
            "date_captured",
            "id",
        } <= set(tree["images"][0])
        assert set(tree["annotations"][0]) == {"image_id", "id", "caption"}


def test_there_are_enough_pictures_in_few_bytes(splits):
    assert len(splits["train"][0]["images"]) == 1200
    assert len(splits["val"][0]["images"]) == 300
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    assert size < 6e6


def test_validation_pairs_known_words_anew(splits):
    seen = {split: set() for split in splits}
    words = {split: set() for split in splits}
    for split, (_, captions) in splits.items():
        for image_id, texts in captions.items():
            (background,) = {background_of(text) for text in texts}
            seen[split].add(((image_id - 1) // len(render.BACKGROUNDS), background))
            words[split].update(word for text in texts for word in text.replace(",", "").split())
    assert not seen["train"] & seen["val"]
    assert {pair[0] for pair in seen["val"]} == {pair[0] for pair in seen["train"]}
    assert words["val"] <= words["train"]


def test_backgrounds_are_used_evenly(splits):
    for (_, captions), most in zip(splits.values(), (1.3, 1.1), strict=True):
        counts = collections.Counter(background_of(texts[0]) for texts in captions.values())
        assert len(counts) == len(render.BACKGROUNDS)
        assert max(counts.values()) <= most * min(counts.values())


def test_a_pictures_corners_have_the_colour_its_captions_name(splits):
    colours = {
        background.name.split()[-1]: np.array(background.rgb) for background in render.BACKGROUNDS
    }
    tree, captions = splits["val"]
    for image in tree["images"]:
        with Image.open(HERE / "val" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            corner = np.asarray(picture.convert("RGB"), dtype=float)[:6, :6].mean(axis=(0, 1))
        nearest = min(colours, key=lambda name: np.linalg.norm(colours[name] - corner))
        assert nearest == background_of(captions[image["id"]][0])


def test_articles_are_right(splits):
    for _, captions in splits.values():
        for text in (text for texts in captions.values() for text in texts):
            words = text.replace(",", "").split()
            for article, noun in itertools.pairwise(words):
                if article in ("a", "an"):
                    vowel = noun[0].lower() in "aeiou" or noun in ("hourglass", "SUV")
                    spoken = vowel and noun not in ("unicorn", "unicorn's", "UFO", "one")
                    assert (article == "an") == spoken, text


def test_backgrounds_that_hide_the_outline_are_left_out():
    hidden = [[1.0 if k < 3 else 0.0 for k in range(8)] for _ in range(40)]
    for val, train in render.choose_backgrounds(hidden, 5):
        assert sorted([val, *train]) == [3, 4, 5, 6, 7]


def test_drawings_fill_four_fifths_of_a_side(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    body = '<rect x="8" y="32" width="100" height="50" fill="#102030"/>'
    icons = {"width": 128, "icons": {"plank": {"body": body}}}
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    monkeypatch.setattr(render, "read_objects", lambda: {"plank": ("a plank",)})
    (drawing,) = render.load_drawings(tmp_path)
    picture = render.rasterize(drawing.body, drawing.view, 100)
    left, top, right, bottom = picture.getchannel("A").getbbox()
    assert abs(right - left - 80) <= 2
    assert abs((left + right) / 2 - 50) <= 1
    assert abs((top + bottom) / 2 - 50) <= 1
