"""What a network accepts: checked before anything is computed, from shapes and types alone.

Nothing here looks at a value, so nothing waits for a device, and `torch.compile` turns every check into a guard. A layer may have
fewer rows than the one below: the first go on, the others are done. Called by `unet`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layered_model.crop import Box
from layered_model.shape import UNetConfig

LayerText = Sequence[tuple[Tensor, Tensor] | None]
"""For each input layer token embeddings and mask of a prompt of its own, or None for the trunk's."""


def check_inputs(
    config: UNetConfig,
    dtype: torch.dtype,
    x: Sequence[Tensor],
    logsnr: Tensor,
    text: Tensor,
    text_mask: Tensor,
    layer_text: LayerText | None = None,
    crop: Box | None = None,
) -> None:
    """Raises ValueError naming the argument, what it is and what it must be for a network with weights of a dtype."""
    if not 1 <= len(x) <= len(config.layers):
        raise ValueError(
            f"x holds {len(x)} pictures, must hold 1 to {len(config.layers)}: "
            f"one for each of {config.layers}, from the first on"
        )
    size = len(logsnr) if logsnr.ndim else 1
    _check("logsnr", logsnr, (size,))
    sizes: list[int] = []
    for layer, (picture, resolution) in enumerate(zip(x, config.layers, strict=False)):
        below = sizes[-1] if sizes else size
        sizes.append(min(below, len(picture)) if layer and picture.ndim else below)
        shape = (sizes[-1], config.picture_channels, resolution, resolution)
        _check(f"x[{layer}]", picture, shape)
        _check_dtype(f"x[{layer}]", picture, dtype)
    _check_text(config, size, "text", text, text_mask)
    _check_dtype("text", text, dtype)
    if layer_text is not None:
        if len(layer_text) != len(x) or layer_text[0] is not None:
            raise ValueError(
                f"layer_text holds {len(layer_text)} entries, must hold one for each of {len(x)} "
                "layers, the first None: the trunk's prompt is text"
            )
        for layer, own in enumerate(layer_text):
            if own is not None:
                _check_text(config, sizes[layer], f"layer_text[{layer}]", *own)
                _check_dtype(f"layer_text[{layer}]", own[0], dtype)
    if crop is not None:
        check_crop(config, crop)


def check_crop(config: UNetConfig, crop: Box) -> None:
    """Raises ValueError where a network cannot compute its upper layers on a crop, or not on this one."""
    if config.kind != "layered":
        raise ValueError(f"crop={crop} needs kind='layered', not {config.kind!r}")
    if config.upper_norm != "pixel":
        raise ValueError(
            f"crop={crop} needs upper_norm='pixel', not {config.upper_norm!r}, "
            "whose statistics over a crop are not those of the whole picture"
        )
    if not crop.fits(config.layers[0]):
        raise ValueError(
            f"crop={crop} must lie within the {config.layers[0]} x {config.layers[0]} pixels of "
            "the lowest layer and hold at least one of them"
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must have {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, must be of floating point")


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    kind = tensor.device.type
    if tensor.dtype != dtype and (kind == "meta" or not torch.is_autocast_enabled(kind)):
        raise ValueError(
            f"{name} is {tensor.dtype}, must be {dtype} like the weights, or under torch.autocast"
        )


def _check_text(config: UNetConfig, size: int, name: str, text: Tensor, mask: Tensor) -> None:
    num_tokens = text.shape[1] if text.ndim > 1 else 1
    _check(name, text, (size, num_tokens, config.text_width))
    if tuple(mask.shape) != (size, num_tokens) or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}, "
            f"must be torch.bool of {(size, num_tokens)}"
        )
