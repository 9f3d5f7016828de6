"""What judges pictures: a frozen network's features and, where it is a classifier, its logits.

A Frechet distance compares the features of generated and real pictures, an Inception-style score uses the class
probabilities; both are only comparable between runs that used the same network, the same weights and the same resize.
So an extractor carries its own preprocessing, the SHA-256 of its weights and a `prefix` that names the numbers made
with it: EfficientNet-Lite0 gives `fd_lite0` and `is_lite0`. FID, KID and IS are the names of what the Inception network
with its published weights (`FID_WEIGHTS`) gives, and of nothing else.

Made by `inception`, `efficientnet` and `vision`, by name through `features`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

FID_WEIGHTS = "pt_inception-2015-12-05-6726825d"
"""Name of the Inception weights that give what is called FID; the digits are their SHA-256's first."""
OF_CLIP = ("cmmd", "clip_score")
"""Numbers that are defined with CLIP, and do not name it."""


class Features(NamedTuple):
    """What an extractor says about a batch of pictures."""

    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b classes"] | None
    "None where the network knows no classes."


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractorSpec:
    """What is to be known of an extractor without its network: enough to name and check what it made."""

    name: str
    """Registry name, as in `evaluate.extractor`."""
    prefix: str
    """Stands in the names of its numbers (`score_name`); empty for FID's own."""
    dim: int
    """Features a picture has."""
    num_classes: int | None
    """Classes the logits are over; None where there are none."""
    preprocess: str
    """The resize and normalisation in words, stored beside every number."""
    weights_sha256: str
    """SHA-256 of the weights file."""
    is_fid: bool = False
    """Whether it is the Inception network with its published weights."""

    def score_name(self, measure: str) -> str:
        """Name of a number: `fd` (Frechet distance), `kd` (kernel distance), `is` or another, with the prefix.

        `fd_lite0`, `is_lite0`; `fid`, `kid`, `is`; `fid_clean` for clean-fid's resize; `cmmd` and `fd_clip`, of another CLIP
        than the authors' `cmmd_1a2b3c4d` and `fd_clip_1a2b3c4d`.
        """
        stem = {"fd": "fid", "kd": "kid"}.get(measure, measure) if self.is_fid else measure
        prefix = self.prefix
        if measure in OF_CLIP:
            prefix = prefix.removeprefix("clip").removeprefix("_")
        return f"{stem}_{prefix}" if prefix else stem

    @property
    def title(self) -> str:
        """Network, weights and resize in a line, for people."""
        weights = FID_WEIGHTS if self.is_fid else f"SHA-256 {self.weights_sha256[:8]}"
        return f"{self.name} (weights: {weights}; {self.preprocess})"


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureExtractor(ExtractorSpec):
    """A frozen network with its preprocessing: call it with uint8 pictures of one size."""

    network: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Preprocessed pictures to (features, logits)."""
    prepare: Callable[[Tensor], Tensor]
    """uint8 NHWC to the network's input."""
    chunk: int | None = None
    """Pictures that the network gets at once; None for all."""

    @property
    def spec(self) -> ExtractorSpec:
        """The same without the network."""
        names = [field.name for field in fields(ExtractorSpec)]
        return ExtractorSpec(**{name: getattr(self, name) for name in names})

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b h w 3"]) -> Features:
        """Return float32 features and logits of `images` (uint8 RGB, NHWC)."""
        with _float32():
            parts = [
                self.network(self.prepare(part))
                for part in torch.split(images, self.chunk or len(images))
            ]
        features, logits = zip(*parts, strict=True)
        return Features(torch.cat(features), None if logits[0] is None else torch.cat(logits))


@contextmanager
def _float32() -> Iterator[None]:
    """Convolutions and matrix products in float32, and by cuDNN's reproducible methods, whatever the caller allows.

    TF32, which cuDNN uses unless told otherwise, moves a distance in the fourth digit.
    """
    cudnn, allowed = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # `enabled` is stated because its default here is no.
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
