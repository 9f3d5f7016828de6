"""The one pair of conversions between pictures at rest and pictures in the model.

At rest: uint8, NHWC, 0 to 255. In the model: float32, NCHW, -1 to 1. Called wherever pictures enter or leave.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

Pictures: TypeAlias = Union["PIL.Image.Image", Sequence["PIL.Image.Image"], Tensor]
"""One or several of Pillow's, or uint8 NHWC."""


def to_float(pictures: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
    """uint8 NHWC to float32 NCHW in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


def to_uint8(x0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
    """Float NCHW to uint8 NHWC; values outside [-1, 1] are clamped."""
    levels = (x0.float() + 1.0) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def from_pillow(name: str, pictures: Pictures | None) -> Tensor | None:
    """Pillow's pictures as one uint8 NHWC; a tensor, and None, as they are.

    Raises:
        ValueError: if they are something else, there is none, or their sizes differ; `name` says which argument they are.
    """
    import numpy as np
    from PIL.Image import Image

    if pictures is None or isinstance(pictures, Tensor):
        return pictures
    several = [pictures] if isinstance(pictures, Image) else pictures
    if not isinstance(several, list | tuple) or not all(
        isinstance(each, Image) for each in several
    ):
        raise ValueError(
            f"{name} is {type(pictures).__name__}; it must be a picture or pictures of Pillow's, or a uint8 tensor [n, h, w, 3]"
        )
    if len({picture.size for picture in several}) != 1:
        raise ValueError(f"{name} must hold at least one picture, and all of one size")
    return torch.from_numpy(np.stack([np.asarray(each.convert("RGB")) for each in several]))
