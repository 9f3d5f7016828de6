"""The layered U-Net: a trunk at the lowest resolution and thin decoders stacked on top of it.

                 x_2 (512) --- in ------------------------.  skip
                 x_1 (256) --- in ----------.  skip       |
    x_0 (128) -> | trunk: U-Net | -> up -> [cat] -> up -> [cat]
                   with text          |       |               |
                     |              blocks  blocks          blocks
                   head_0                   head_1          head_2

Khwaja et al. 2024 (https://arxiv.org/abs/2407.06079): every resolution has an input and an output. Downsampling is isolated:
a higher layer's input reaches only its own decoder, through one convolution and one skip, and never the layers below. So an
output depends on its own and lower inputs alone, which gives early exit, and growth that leaves lower outputs bit-identical.

Sizes are per *level*, from the highest resolution down, each level halving the side. Levels above ``resolutions[0]`` are
decoders only; the rest is the trunk, an ordinary U-Net with self- and cross-attention (see `blocks`). Called by `diffusion`,
`sampler` and `pipeline`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layered_model.blocks import (
    Head,
    LogSNREmbedding,
    ResidualBlock,
    TransformerBlock,
    Upsample,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Shape of a `LayeredUNet`. Tuples run from the highest level down unless said otherwise."""

    resolutions: tuple[int, ...]
    "Pixels of a side of each layer, low to high; each a power-of-two multiple of the one below, e.g. (128, 256, 512)."
    channels: tuple[int, ...]
    "Width of each level."
    blocks: tuple[int, ...]
    """Residual blocks of each level: in the trunk that many on the way down and one more on the way up, each of which
    takes one skip; above the trunk on the way up only."""
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

    def __post_init__(self) -> None:
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


class TextConditioning(nn.Module):
    """Projects token embeddings, and stands a learned null token in for an absent text.

    The null token is always attended to beside the text's tokens, so a mask without any true entry is legal: it *is* the
    unconditional model of classifier-free guidance.
    """

    def __init__(self, text_width: int, context_width: int, embedding_width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, context_width))
        self.norm = nn.LayerNorm(context_width)
        self.null = nn.Parameter(torch.randn(context_width))
        self.pool = nn.Linear(context_width, embedding_width)

    def forward(
        self, text: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n1 c"], Bool[Tensor, "b n1"], Float[Tensor, "b e"]]:
        """Context tokens, their mask, and the pooled text for the embedding."""
        null = self.null.expand(len(text), 1, -1)
        tokens = torch.cat([null, self.project(text)], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        pooled = (tokens * weight).sum(1) / weight.sum(1)
        return self.norm(tokens), mask, self.pool(pooled)


class TrunkStage(nn.Module):
    """One residual block followed by its transformer blocks."""

    def __init__(
        self, in_channels: int, channels: int, num_transformers: int, config: UNetConfig
    ) -> None:
        super().__init__()
        width = config.embedding_width
        self.residual = ResidualBlock(in_channels, channels, width, config.dropout)
        self.transformers = nn.ModuleList(
            TransformerBlock(channels, width, config.head_width) for _ in range(num_transformers)
        )

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Picture features to picture features."""
        x = self.residual(x, embedding)
        for transformer in self.transformers:
            x = transformer(x, context, mask)
        return x


class Trunk(nn.Module):
    """An ordinary text-conditioned U-Net at the lowest resolution, without its head."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        upper = config.num_upper_levels
        levels = list(
            zip(config.channels[upper:], config.blocks[upper:], config.attention, strict=True)
        )
        width = levels[0][0]
        self.input = nn.Conv2d(config.picture_channels, width, 3, padding=1)
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for channels, num_blocks, attention in levels:
            if self.encoder:
                self.downs.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
            stages = nn.ModuleList()
            for _ in range(num_blocks):
                stages.append(TrunkStage(width, channels, attention, config))
                width = channels
                skips.append(width)
            self.encoder.append(stages)

        self.mid = nn.ModuleList(
            TrunkStage(width, width, config.attention[-1], config) for _ in range(config.mid_blocks)
        )

        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        for channels, num_blocks, attention in reversed(levels):
            if self.decoder:
                self.ups.append(Upsample(width, channels))
                width = channels
            stages = nn.ModuleList()
            for _ in range(num_blocks + 1):
                stages.append(TrunkStage(width + skips.pop(), channels, attention, config))
                width = channels
            self.decoder.append(stages)

    def forward(
        self,
        x: Float[Tensor, "b p h w"],
        embedding: Float[Tensor, "b e"],
        context: Float[Tensor, "b n e"],
        mask: Bool[Tensor, "b n"],
    ) -> Float[Tensor, "b c h w"]:
        """Noisy picture to the features of the trunk's last level."""
        h = self.input(x)
        skips = [h]
        for level, stages in enumerate(self.encoder):
            if level:
                h = self.downs[level - 1](h)
                skips.append(h)
            for stage in cast(nn.ModuleList, stages):
                h = stage(h, embedding, context, mask)
                skips.append(h)
        for stage in self.mid:
            h = stage(h, embedding, context, mask)
        for level, stages in enumerate(self.decoder):
            if level:
                h = self.ups[level - 1](h)
            for stage in cast(nn.ModuleList, stages):
                h = stage(torch.cat([h, skips.pop()], dim=1), embedding, context, mask)
        return h


class UpperLayer(nn.Module):
    """One resolution above the trunk: upsampling from the layer below, one input convolution as skip, residual blocks.

    A ratio of 4 or more to the layer below passes through levels without an input of their own.
    """

    def __init__(self, in_channels: int, levels: Sequence[tuple[int, int]], config: UNetConfig):
        super().__init__()
        self.ups, self.stages = nn.ModuleList(), nn.ModuleList()
        top = levels[-1][0]
        self.input = nn.Conv2d(config.picture_channels, top, 3, padding=1)
        for index, (channels, num_blocks) in enumerate(levels):
            self.ups.append(Upsample(in_channels, channels))
            skip = top if index + 1 == len(levels) else 0
            self.stages.append(
                nn.ModuleList(
                    ResidualBlock(
                        channels + (skip if block == 0 else 0), channels, config.embedding_width
                    )
                    for block in range(num_blocks)
                )
            )
            in_channels = channels

    def forward(
        self,
        h: Float[Tensor, "b c h w"],
        x: Float[Tensor, "b p h2 w2"],
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Features of the layer below and this layer's noisy picture to this layer's features."""
        last = len(self.ups) - 1
        for level, (up, stages) in enumerate(zip(self.ups, self.stages, strict=True)):
            h = up(h)
            if level == last:
                h = torch.cat([h, self.input(x)], dim=1)
            for stage in cast(nn.ModuleList, stages):
                h = stage(h, embedding)
        return h


class LayeredUNet(nn.Module):
    """Predicts every layer from every layer's noisy picture, in one pass."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding_width
        self.logsnr = LogSNREmbedding(width)
        self.text = TextConditioning(config.text_width, width, width)
        self.trunk = Trunk(config)
        self.upper = nn.ModuleList()
        # Levels above the trunk, from low to high, cut into one group per layer.
        level = config.num_upper_levels
        below, channels = config.resolutions[0], config.channels[level]
        self.heads = nn.ModuleList([Head(channels, config.picture_channels)])
        for resolution in config.resolutions[1:]:
            steps = (resolution // below).bit_length() - 1
            levels = [
                (config.channels[i], config.blocks[i])
                for i in range(level - 1, level - steps - 1, -1)
            ]
            self.upper.append(UpperLayer(channels, levels, config))
            level, below, channels = level - steps, resolution, levels[-1][0]
            self.heads.append(Head(channels, config.picture_channels))

    def forward(
        self,
        x: Sequence[Float[Tensor, "b p _h _w"]],
        logsnr: Float[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
    ) -> list[Float[Tensor, "b p _h _w"]]:
        """One prediction per input layer.

        Args:
            x: Noisy pictures, low to high. Fewer than all layers is an early exit: only what they need is computed.
            logsnr: The reference's logsnr of each picture; the layers differ from it by constants.
            text: Token embeddings.
            text_mask: True where a token is real. A row without any is unconditional.
        """
        context, mask, pooled = self.text(text, text_mask)
        embedding = self.logsnr(logsnr) + pooled
        h = self.trunk(x[0], embedding, context, mask)
        outputs = [self.heads[0](h)]
        for layer, head, x_layer in zip(self.upper, self.heads[1:], x[1:], strict=False):
            h = layer(h, x_layer, embedding)
            outputs.append(head(h))
        return outputs
