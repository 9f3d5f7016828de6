"""Vision transformers as extractors, through transformers: DINOv2 and CLIP. They know no classes.

DINOv2 (Oquab et al., 2023, https://arxiv.org/abs/2304.07193) gives its class token. The Frechet distance of ViT-L/14's is
FD-DINOv2 (Stein et al., 2023, "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion
models", https://arxiv.org/abs/2306.04675). The resize is theirs, Pillow's bicubic, but for the rounding to 8 bits; EDM2's (Karras
et al., 2024, https://arxiv.org/abs/2312.02696) does not clamp either.

CLIP (Radford et al., 2021, https://arxiv.org/abs/2103.00020) gives the picture's embedding, before it is brought to unit length;
its other tower, `ClipText`, that of a caption. CMMD (Jayasumana et al., 2024, "Rethinking FID", https://arxiv.org/abs/2401.09603)
and CLIP score (Hessel et al., 2021, https://arxiv.org/abs/2104.08718) are made of them. CMMD's authors cut out the middle square
first; here a picture is squeezed into it, as by every other extractor.

Numbers of the models named in `HUB` are called after the network alone; those of others carry the first digits of the weights'
SHA-256. transformers is imported when a model is loaded, not before. Called by `features` and `pipelines.extractors`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from layered_model.extractor import FeatureExtractor
from layered_model.text import quiet

HUB = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
"""What is loaded where no weights are named."""
DINOV2_SIDE = 224
_FILES = ("model.safetensors", "pytorch_model.bin")
"""As transformers looks for them."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def load_dinov2(
    name: str, device: torch.device, weights: str | Path | bytes | None, sha256: str | None
) -> FeatureExtractor:
    """Return DINOv2's class token, at 224 pixels.

    Args:
        name: in the registry.
        device: where it computes.
        weights: directory of a model in transformers' form, or its name on the hub; None for ViT-L/14.
        sha256: what the weights file's SHA-256 must be; None for whatever it is.

    Raises:
        ValueError: there is no such model, or its weights are others.
    """
    model, found = _load("Dinov2Model", name, weights, sha256)
    return _extractor(
        name,
        weights,
        found,
        device,
        dim=model.config.hidden_size,
        side=DINOV2_SIDE,
        normalization=_IMAGENET,
        network=lambda x: (model(pixel_values=x).pooler_output, None),
        model=model,
    )


def load_clip(
    name: str, device: torch.device, weights: str | Path | bytes | None, sha256: str | None
) -> FeatureExtractor:
    """Return CLIP's embedding of pictures, not of unit length, at the model's own number of pixels.

    Args:
        name: in the registry.
        device: where it computes.
        weights: directory of a model in transformers' form, or its name on the hub; None for ViT-L/14 at 336 pixels.
        sha256: what the weights file's SHA-256 must be; None for whatever it is.

    Raises:
        ValueError: there is no such model, or its weights are others.
    """
    model, found = _load("CLIPVisionModelWithProjection", name, weights, sha256)
    return _extractor(
        name,
        weights,
        found,
        device,
        dim=model.config.projection_dim,
        side=model.config.image_size,
        normalization=_CLIP,
        network=lambda x: (model(pixel_values=x).image_embeds, None),
        model=model,
    )


class ClipText:
    """The tower of CLIP that reads captions.

    Args:
        device: where it computes.
        weights: as `load_clip` has them.
        sha256: as `load_clip` has it.

    Raises:
        ValueError: there is no such model, or its weights are others.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        weights: str | Path | None = None,
        sha256: str | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        model, self.weights_sha256 = _load("CLIPTextModelWithProjection", "clip", weights, sha256)
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(weights or HUB["clip"])

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> Float[Tensor, "b d"]:
        """Return float32 embeddings; a caption longer than CLIP reads (77 tokens) is cut."""
        tokens = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.model.config.max_position_embeddings,
            return_tensors="pt",
        )
        inputs = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        return self.model(**inputs).text_embeds


def _extractor(
    name: str,
    weights: str | Path | bytes | None,
    sha256: str,
    device: torch.device,
    *,
    dim: int,
    side: int,
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    network: Any,
    model: Any,
) -> FeatureExtractor:
    model.to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in normalization)

    def prepare(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 side side"]:
        x = images.to(device).permute(0, 3, 1, 2).to(torch.float32)
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
        return (x / 255 - mean) / std

    return FeatureExtractor(
        name=name,
        prefix=name if weights in (None, HUB[name]) else f"{name}_{sha256[:8]}",
        dim=dim,
        num_classes=None,
        preprocess=f"antialiased bicubic to {side} in float32, clamp to [0, 255], {name}'s mean and deviation",
        weights_sha256=sha256,
        network=network,
        prepare=prepare,
    )


def _load(
    kind: str, name: str, weights: str | Path | bytes | None, sha256: str | None
) -> tuple[Any, str]:
    """A model of transformers, frozen, and the SHA-256 of its weights file."""
    if isinstance(weights, bytes):
        raise ValueError("takes a directory in transformers' form or a name on the model hub")
    import transformers

    source = str(weights or HUB[name])
    try:
        with quiet():
            path = _weights_file(source)
            family = transformers.AutoConfig.from_pretrained(source).model_type
            if not family.startswith(name):
                raise ValueError(f"{source} is a model of the family {family!r}, not {name!r}")
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 not in (None, found):
                raise ValueError(f"{path} has the SHA-256 {found}, not the stated one, {sha256}")
            model, loaded = getattr(transformers, kind).from_pretrained(
                source, dtype=torch.float32, output_loading_info=True
            )
            # transformers would fill them with random numbers, and warn.
            if missing := sorted(loaded["missing_keys"]):
                raise ValueError(f"{path} lacks {', '.join(missing[:3])}")
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{source}: {reason or type(error).__name__}; name a directory with the model in transformers' form"
        ) from error
    return model.requires_grad_(False).eval(), found


def _weights_file(source: str) -> Path:
    """The file that transformers will load."""
    from transformers.utils.hub import cached_file

    for file in _FILES[:-1]:
        try:
            return Path(str(cached_file(source, file)))
        except OSError:  # perhaps it has the other form
            continue
    return Path(str(cached_file(source, _FILES[-1])))
