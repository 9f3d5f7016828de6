"""Made-up pictures and captions have COCO's form, sizes and bytes."""

import json

import numpy as np
import torch
from PIL import Image

from layered_model.text import TextEncoder
from pipelines import generated


def test_pictures_and_captions_are_like_cocos(tmp_path) -> None:
    captions, pictures = generated.coco(tmp_path, 40)
    tree = json.loads(captions.read_text())
    assert len(tree["images"]) == 40
    assert len(tree["annotations"]) == 40 * 5
    num_bytes = num_pixels = 0
    for image in tree["images"]:
        path = pictures / image["file_name"]
        with Image.open(path) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.format == "JPEG"
        num_bytes += path.stat().st_size
        num_pixels += image["width"] * image["height"]
    assert 0.5 < num_bytes / num_pixels < 0.64  # COCO's is 0.57
    words = [len(annotation["caption"].split()) for annotation in tree["annotations"]]
    assert 9.5 < np.mean(words) < 11  # COCO's is 10.4

    first = json.loads(generated.first_of(captions, 3, tmp_path / "first.json").read_text())
    assert first["images"] == tree["images"][:3]
    assert first["annotations"] == tree["annotations"][:15]


def test_an_annotation_file_gives_sizes_and_captions(tmp_path) -> None:
    sizes = {7: (40, 30), 3: (20, 50)}
    images = [{"id": k, "width": w, "height": h} for k, (w, h) in sizes.items()]
    annotations = [{"id": 1, "image_id": 3, "caption": "tall"}]
    annotations += [{"id": k, "image_id": 7, "caption": f"wide {k}"} for k in (5, 6)]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"images": images, "annotations": annotations}))
    captions, pictures = generated.coco(tmp_path, 5, str(given))
    tree = json.loads(captions.read_text())
    found = [(image["width"], image["height"]) for image in tree["images"]]
    assert found == [(40, 30), (20, 50), (40, 30), (20, 50), (40, 30)]
    texts = [annotation["caption"] for annotation in tree["annotations"]]
    assert texts == ["wide 5", "wide 6", "tall", "wide 5", "wide 6", "tall", "wide 5", "wide 6"]
    contents = {path.read_bytes() for path in pictures.iterdir()}
    assert len(contents) == 5  # of one size, but not the same


def test_the_encoder_is_a_real_one(tmp_path) -> None:
    path = generated.encoder(tmp_path, 32)
    encoder = TextEncoder.from_pretrained(str(path), max_tokens=8)
    one, other = encoder.encode(["a red bus", "a red cat"]).tokens
    assert one.shape == (4, 32)
    assert not torch.equal(one[1], other[1])  # it depends on what stands beside it
