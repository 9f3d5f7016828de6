"""DINOv2 and CLIP as extractors, with small random models in transformers' form."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layered_model.features import load_extractor
from layered_model.vision import ClipText

PICTURES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 40, 40, 3), np.uint8))
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def _sha256(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _with_pillow(side: int) -> torch.Tensor:
    """NCHW in [0, 1], resized in 8 bits."""
    resized = [
        np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
        for picture in PICTURES.numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255


def test_dinov2_is_the_class_token_of_the_normalised_picture(dinov2) -> None:
    from transformers import Dinov2Model

    extractor = load_extractor("dinov2", weights=str(dinov2))
    features, logits = extractor(PICTURES)
    assert logits is None
    assert extractor.num_classes is None
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (_with_pillow(224) - mean[:, None, None]) / std[:, None, None]
    with torch.inference_mode():
        hidden = Dinov2Model.from_pretrained(dinov2).eval()(pixel_values=x).last_hidden_state
    assert features.shape == (3, extractor.dim)
    torch.testing.assert_close(features, hidden[:, 0], rtol=0, atol=0.02)  # rounding to 8 bits


def test_clip_embeds_pictures_and_captions_in_one_space(clip) -> None:
    from transformers import AutoTokenizer, CLIPModel

    extractor, read = load_extractor("clip", weights=str(clip)), ClipText(weights=str(clip))
    pictures, captions = extractor(PICTURES).features, ["a red apple", "two dogs run", "a cat"]
    texts = read(captions)
    assert pictures.shape == texts.shape == (3, extractor.dim)
    assert read.weights_sha256 == extractor.weights_sha256
    x = (_with_pillow(32) - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None]
    tokens = AutoTokenizer.from_pretrained(clip)(captions, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    with torch.inference_mode():
        both = CLIPModel.from_pretrained(clip).eval()(
            input_ids=ids, attention_mask=mask, pixel_values=x
        )
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(pictures), both.image_embeds, rtol=0, atol=0.01)
    torch.testing.assert_close(unit(texts), both.text_embeds, rtol=0, atol=1e-5)


def test_a_long_caption_is_cut_and_neighbours_do_not_matter(clip) -> None:
    read = ClipText(weights=str(clip))
    long = " ".join(["cat"] * 40)
    together = read([long, "a red apple"])
    assert together.isfinite().all()
    torch.testing.assert_close(read(["a red apple"])[0], together[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_numbers_of_ones_own_weights_carry_their_digits(name, request) -> None:
    directory = request.getfixturevalue(name)
    extractor = load_extractor(name, weights=str(directory))
    assert extractor.score_name("fd") == f"fd_{name}_{_sha256(directory)[:8]}"
    assert load_extractor(name, weights=str(directory), sha256=_sha256(directory)).dim > 0
    with pytest.raises(ValueError, match=r"model.safetensors has the SHA-256 .*not the stated one"):
        load_extractor(name, weights=str(directory), sha256="0" * 64)


def test_what_is_no_such_model_is_named(dinov2, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a model of the family 'dinov2', not 'clip'"):
        load_extractor("clip", weights=str(dinov2))
    with pytest.raises(ValueError, match=r"nothing: .*; name a directory"):
        load_extractor("dinov2", weights=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="takes a directory in transformers' form"):
        load_extractor("dinov2", weights=b"weights")
