"""Feature extractors by name, as `evaluate.extractor` has them.

| name | network | numbers |
|---|---|---|
| inception | FID's, with TensorFlow's resize, as torch-fidelity | fid, kid, is |
| inception_pytorch, inception_clean | the same with the resize of pytorch-fid or clean-fid | fid_pytorch, fid_clean, ... |
| efficientnet_lite0 | EfficientNet-Lite0, from a package | fd_lite0, is_lite0 |
| dinov2 | DINOv2, through transformers | fd_dinov2 |
| clip | CLIP's pictures, through transformers | fd_clip, cmmd |

Called by `pipelines.extractors`.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from layered_model import efficientnet, inception, vision
from layered_model.extractor import ExtractorSpec as ExtractorSpec
from layered_model.extractor import FeatureExtractor as FeatureExtractor
from layered_model.extractor import Features as Features

Weights = str | Path | bytes | None
EXTRACTORS: dict[str, Callable[[str, torch.device, Weights, str | None], FeatureExtractor]] = {
    **dict.fromkeys(inception.PREPROCESS, inception.load),
    "efficientnet_lite0": efficientnet.load,
    "dinov2": vision.load_dinov2,
    "clip": vision.load_clip,
}
"""Each takes name, device, weights and their SHA-256."""


def load_extractor(
    name: str,
    device: str | torch.device = "cpu",
    *,
    weights: Weights = None,
    sha256: str | None = None,
) -> FeatureExtractor:
    """Load a feature extractor by its registry name.

    Args:
        name: one of `EXTRACTORS`.
        device: where it computes.
        weights: where they come from: of an Inception network the file or its content, of DINOv2 and CLIP a directory or a name
            on the model hub. None for the published ones, from the network's package or by download.
        sha256: SHA-256 of the weights file; says that weights other than the published ones are wanted.

    Raises:
        ValueError: the name is not in the registry, or the weights are not what they should be.
        OSError: the weights cannot be read or downloaded, or the package that holds them is not installed.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}, known: {', '.join(sorted(EXTRACTORS))}")
    return EXTRACTORS[name](name, torch.device(device), weights, sha256)
