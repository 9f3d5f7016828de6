"""What every network shares: the text's way in, and the trunk that it conditions.

The trunk is a U-Net of residual and transformer blocks (see `blocks`) at the lowest resolution; each block on the way up takes
one skip from the way down. Called by `unet`.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layered_model.blocks import ResidualBlock, RowLinear, TransformerBlock, Upsample
from layered_model.shape import UNetConfig


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
        self.pool = RowLinear(context_width, embedding_width)

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
    """An ordinary text-conditioned U-Net at the lowest resolution, without its head.

    Args:
        config: Shape of the network.
        entrance: Makes the first level's features: a convolution of the picture, or nothing where features come in.
    """

    def __init__(self, config: UNetConfig, entrance: nn.Module) -> None:
        super().__init__()
        upper = config.num_upper_levels
        levels = list(
            zip(config.channels[upper:], config.blocks[upper:], config.attention, strict=True)
        )
        width = levels[0][0]
        self.input = entrance
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
        x: Float[Tensor, "b p _h _w"],
        embedding: Float[Tensor, "b e"],
        context: Float[Tensor, "b n e"],
        mask: Bool[Tensor, "b n"],
    ) -> Float[Tensor, "b c _h _w"]:
        """Noisy picture, or features, to the features of the trunk's last level."""
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
