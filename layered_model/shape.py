"""The shape of a network: resolutions, widths, numbers of blocks.

Sizes are per *level*, from the highest resolution down, each level halving the side. Levels above ``resolutions[0]`` lie above
the trunk; the rest is the trunk, an ordinary U-Net with self- and cross-attention. Called by `unet`, `trunk`, `presets`,
`checkpoint` and the configuration of the pipelines.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Shape of a network. Tuples run from the highest level down unless said otherwise."""

    kind: Literal["layered", "single_scale"] = "layered"
    "'layered', or 'single_scale': the ordinary U-Net of the same trunk and decoders, with the top alone in and out."
    resolutions: tuple[int, ...]
    """Pixels of a side of each layer, low to high; each a power-of-two multiple of the one below, e.g. (128, 256, 512). Of a
    single-scale network the first says where the trunk begins and the last what goes in and out."""
    channels: tuple[int, ...]
    "Width of each level."
    blocks: tuple[int, ...]
    """Residual blocks of each level: in the trunk that many on the way down and one more on the way up, each of which
    takes one skip; above the trunk on the way up, and of a single-scale network as many on the way down."""
    attention: tuple[int, ...]
    "Transformer blocks after each residual block, for each level of the trunk; 0 for none."
    mid_blocks: int
    "Residual blocks at the bottom, each followed by the lowest level's transformer blocks."
    embedding_width: int
    "Width of the embedding of logsnr and pooled text that modulates every residual block."
    head_width: int
    "Channels of an attention head."
    text_width: int
    "Width of the text encoder's token embeddings."
    dropout: float
    "Dropout in the trunk's residual blocks, in [0, 1)."
    picture_channels: int = 3
    "Channels of a picture."
    upper_norm: Literal["group", "pixel"] = "group"
    "Norm above the trunk: over groups of channels and all pixels, or over each pixel's channels, which crops need."

    def __post_init__(self) -> None:
        if self.kind not in ("layered", "single_scale"):
            raise ValueError(f"kind={self.kind!r} must be 'layered' or 'single_scale'")
        if self.upper_norm not in ("group", "pixel"):
            raise ValueError(f"upper_norm={self.upper_norm!r} must be 'group' or 'pixel'")
        _check_resolutions(self.resolutions)
        for name in ("embedding_width", "head_width", "text_width", "picture_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.mid_blocks < 0:
            raise ValueError(f"mid_blocks={self.mid_blocks} must not be negative")
        if min(self.channels, default=1) < 1:
            raise ValueError(f"channels={self.channels} must be positive")
        levels, trunk_levels = len(self.channels), self.num_trunk_levels
        if trunk_levels < 1:
            raise ValueError(
                f"channels={self.channels} must have more than {self.num_upper_levels} levels: "
                f"{self.resolutions[-1]} halves that often before it reaches {self.resolutions[0]}"
            )
        for name, values, length in (
            ("blocks", self.blocks, levels),
            ("attention", self.attention, trunk_levels),
        ):
            if len(values) != length or min(values) < 0:
                raise ValueError(
                    f"{name}={values} must hold {length} counts: of {levels} levels "
                    f"{trunk_levels} are the trunk's"
                )
        top = self.resolutions[-1]
        for resolution in self.resolutions[1:]:
            if not self.blocks[(top // resolution).bit_length() - 1]:
                raise ValueError(
                    f"blocks={self.blocks} must hold at least 1 for resolution {resolution}, "
                    "where a picture comes in"
                )
        if self.resolutions[0] % 2 ** (trunk_levels - 1):
            raise ValueError(
                f"channels={self.channels} halves resolution {self.resolutions[0]} "
                f"{trunk_levels - 1} times, which does not divide it"
            )
        for channels, blocks in zip(self.channels[-trunk_levels:], self.attention, strict=True):
            if blocks and channels % self.head_width:
                raise ValueError(f"head_width={self.head_width} must divide channels {channels}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def layers(self) -> tuple[int, ...]:
        """Resolutions that go in and out, low to high."""
        return self.resolutions if self.kind == "layered" else self.resolutions[-1:]

    @property
    def num_upper_levels(self) -> int:
        """Levels above the trunk."""
        return (self.resolutions[-1] // self.resolutions[0]).bit_length() - 1

    @property
    def num_trunk_levels(self) -> int:
        """Levels of the trunk."""
        return len(self.channels) - self.num_upper_levels


def _check_resolutions(resolutions: tuple[int, ...]) -> None:
    if not resolutions or resolutions[0] < 1:
        raise ValueError(f"resolutions={resolutions} must hold at least one positive resolution")
    for low, high in pairwise(resolutions):
        ratio = high // low
        if high <= low or high % low or ratio & (ratio - 1):
            raise ValueError(
                f"resolutions={resolutions}: {high} must be 2, 4, 8, ... times {low}, the one below"
            )
