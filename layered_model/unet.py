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

`SingleScaleUNet` is what the paper compares with: the same trunk and the same decoders under an ordinary way down, from the top
resolution alone to the top resolution alone. Shapes: `shape`, `presets`. Called by `pipeline`.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layered_model.blocks import NORMS, Head, LogSNREmbedding, ResidualBlock, Upsample
from layered_model.crop import Box
from layered_model.inputs import LayerText, check_inputs
from layered_model.shape import UNetConfig
from layered_model.trunk import TextConditioning, Trunk

__all__ = ["LayeredUNet", "Network", "SingleScaleUNet", "UNetConfig", "make_network"]


class UpperDecoder(nn.Module):
    """Levels above the trunk on the way up, low to high: upsampling, then residual blocks.

    Args:
        in_channels: Width of the level below.
        levels: Width and number of blocks of each level.
        skips: Widths of each level's skips, in the order taken: one a block, as far as there are.
        config: Shape of the network.
    """

    def __init__(
        self,
        in_channels: int,
        levels: Sequence[tuple[int, int]],
        skips: Sequence[Sequence[int]],
        config: UNetConfig,
    ) -> None:
        super().__init__()
        norm = NORMS[config.upper_norm]
        self.ups, self.stages = nn.ModuleList(), nn.ModuleList()
        for (channels, num_blocks), widths in zip(levels, skips, strict=True):
            self.ups.append(Upsample(in_channels, channels))
            extra = [*widths, *[0] * num_blocks]
            self.stages.append(
                nn.ModuleList(
                    ResidualBlock(
                        channels + extra[block], channels, config.embedding_width, norm=norm
                    )
                    for block in range(num_blocks)
                )
            )
            in_channels = channels

    def forward(
        self,
        h: Float[Tensor, "b c h w"],
        skips: Sequence[Sequence[Float[Tensor, "b _c _h _w"]]],
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Features of the level below and each level's skips to the last level's features."""
        for up, stages, taken in zip(self.ups, self.stages, skips, strict=True):
            h = up(h)
            for block, stage in enumerate(cast(nn.ModuleList, stages)):
                h = stage(torch.cat([h, taken[block]], 1) if block < len(taken) else h, embedding)
        return h


class UpperLayer(UpperDecoder):
    """One resolution above the trunk: upsampling from the layer below, one input convolution as skip, residual blocks.

    A ratio of 4 or more to the layer below passes through levels without an input of their own.
    """

    def __init__(self, in_channels: int, levels: Sequence[tuple[int, int]], config: UNetConfig):
        top = levels[-1][0]
        entrance = nn.Conv2d(config.picture_channels, top, 3, padding=1)
        super().__init__(in_channels, levels, [*[()] * (len(levels) - 1), (top,)], config)
        self.input = entrance

    def forward(  # type: ignore[override]
        self,
        h: Float[Tensor, "b c h w"],
        x: Float[Tensor, "b p h2 w2"],
        embedding: Float[Tensor, "b e"],
    ) -> Float[Tensor, "b c2 h2 w2"]:
        """Features of the layer below and this layer's noisy picture to this layer's features."""
        skips = [*[()] * (len(self.ups) - 1), (self.input(x),)]
        return super().forward(h, skips, embedding)

    def margin_below(self, margin: int) -> int:
        """Pixels of the layer below, around a crop, on which this layer's within a margin around it depend.

        The convolution that follows upsampling reaches one pixel, and so does each of a residual block's two.
        """
        for stages in reversed(self.stages):
            margin = -(-(margin + 1 + 2 * len(cast(nn.ModuleList, stages))) // 2)
        return margin


class LayeredUNet(nn.Module):
    """Predicts every layer from every layer's noisy picture, in one pass."""

    checkpoint_upper = False
    "Computes what lies above the trunk again on the way back, in place of keeping its activations."

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check_kind(config, "layered")
        self.config = config
        width = config.embedding_width
        self.logsnr = LogSNREmbedding(width)
        self.text = TextConditioning(config.text_width, width, width)
        level = config.num_upper_levels
        below, channels = config.resolutions[0], config.channels[level]
        self.trunk = Trunk(config, nn.Conv2d(config.picture_channels, channels, 3, padding=1))
        self.upper = nn.ModuleList()
        # Levels above the trunk, from low to high, cut into one group per layer.
        self.heads = nn.ModuleList([Head(channels, config.picture_channels)])
        for resolution in config.resolutions[1:]:
            steps = (resolution // below).bit_length() - 1
            levels = _levels_up(config)[-level:][:steps]
            self.upper.append(UpperLayer(channels, levels, config))
            level, below, channels = level - steps, resolution, levels[-1][0]
            self.heads.append(Head(channels, config.picture_channels, NORMS[config.upper_norm]))

    def forward(
        self,
        x: Sequence[Float[Tensor, "_b p _h _w"]],
        logsnr: Float[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        *,
        layer_text: LayerText | None = None,
        crop: Box | None = None,
    ) -> list[Float[Tensor, "_b p _h2 _w2"]]:
        """One prediction per input layer.

        Args:
            x: Noisy pictures, low to high. Fewer than all layers is an early exit: only what they need is computed. So is a layer
                with fewer rows than the one below, which then are those of the first rows.
            logsnr: The reference's logsnr of each picture; the layers differ from it by constants.
            text: Token embeddings.
            text_mask: True where a token is real. A row without any is unconditional.
            layer_text: For each layer a prompt of its own, whose pooled text replaces the trunk's in its embedding, or None.
                The trunk has its prompt in `text`, so the first is None.
            crop: Part of the picture, in pixels of the lowest layer, on which alone the layers above it are computed and
                returned. Pictures come in whole.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        dtype = self.text.null.dtype
        check_inputs(self.config, dtype, x, logsnr, text, text_mask, layer_text, crop)
        context, mask, pooled = self.text(text, text_mask)
        time = self.logsnr(logsnr)
        shared = time + pooled
        h = self.trunk(x[0], shared, context, mask)
        outputs = [self.heads[0](h)]
        margins = self._margins(len(x)) if crop else []
        region: Box | None = None
        for layer in range(1, len(x)):
            picture = x[layer]
            if crop is not None:
                below, ratio = self.config.resolutions[layer - 1 : layer + 1]
                ratio //= below
                needed = crop.grown(margins[layer - 1], below)
                h = needed.cut(h, region)
                crop, region = crop.scaled(ratio), needed.scaled(ratio)
                picture = region.cut(picture)
            own = layer_text[layer] if layer_text else None
            if len(picture) < len(h):
                h, time, shared = (rows[: len(picture)] for rows in (h, time, shared))
            embedding = shared if own is None else time + self.text(*own)[2]
            h, output = _run(self._layer, self.checkpoint_upper, layer, h, picture, embedding)
            outputs.append(output if crop is None else crop.cut(output, region))
        return outputs

    def _layer(
        self, layer: int, h: Tensor, picture: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features and output of a layer above the trunk."""
        h = self.upper[layer - 1](h, picture, embedding)
        return h, self.heads[layer](h)

    def _margins(self, num_layers: int) -> list[int]:
        """How far around a crop each layer's features must be right: for its own head, and for what is computed from them."""
        margins = [1]
        for layer in range(num_layers - 1, 0, -1):
            below = cast(UpperLayer, self.upper[layer - 1]).margin_below(margins[0])
            margins.insert(0, max(1, below))
        return margins


class EncoderLevel(nn.Module):
    """One level above the trunk on the way down: residual blocks, then a convolution that halves the side."""

    def __init__(self, channels: int, channels_below: int, num_blocks: int, config: UNetConfig):
        super().__init__()
        self.stages = nn.ModuleList(
            ResidualBlock(channels, channels, config.embedding_width, norm=NORMS[config.upper_norm])
            for _ in range(num_blocks)
        )
        self.down = nn.Conv2d(channels, channels_below, 3, stride=2, padding=1)

    def forward(
        self, h: Float[Tensor, "b c h w"], embedding: Float[Tensor, "b e"]
    ) -> tuple[Float[Tensor, "b c2 h2 w2"], list[Float[Tensor, "b c h w"]]]:
        """Features of the level below, and the blocks' outputs as skips in the order in which the decoder takes them."""
        skips = []
        for stage in self.stages:
            h = stage(h, embedding)
            skips.append(h)
        return self.down(h), skips[::-1]


class SingleScaleUNet(nn.Module):
    """Predicts the top resolution from the top's noisy picture: an ordinary U-Net, to compare with.

    Its trunk and decoders are the layered network's. What differs is the way down: at each level above the trunk residual
    blocks and a halving convolution in place of a picture's input, and each of the decoder's blocks takes one of their skips.
    """

    checkpoint_upper = False
    "As in a `LayeredUNet`."

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check_kind(config, "single_scale")
        self.config = config
        width, upper = config.embedding_width, config.num_upper_levels
        self.logsnr = LogSNREmbedding(width)
        self.text = TextConditioning(config.text_width, width, width)
        self.input = nn.Conv2d(config.picture_channels, config.channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(
            EncoderLevel(channels, config.channels[level + 1], num_blocks, config)
            for level, (channels, num_blocks) in enumerate(reversed(_levels_up(config)))
        )
        self.trunk = Trunk(config, nn.Identity())
        below = [config.channels[upper], *(channels for channels, _ in _levels_up(config))]
        self.upper = nn.ModuleList(
            UpperDecoder(channels, [level], [[level[0]] * level[1]], config)
            for channels, level in zip(below, _levels_up(config), strict=False)
        )
        norm = NORMS[config.upper_norm if upper else "group"]
        self.heads = nn.ModuleList([Head(config.channels[0], config.picture_channels, norm)])

    def forward(
        self,
        x: Sequence[Float[Tensor, "b p _h _w"]],
        logsnr: Float[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        *,
        layer_text: LayerText | None = None,
        crop: Box | None = None,
    ) -> list[Float[Tensor, "b p _h _w"]]:
        """The call of a `LayeredUNet` with one layer: one noisy picture in, one prediction out, no crops."""
        dtype = self.text.null.dtype
        check_inputs(self.config, dtype, x, logsnr, text, text_mask, layer_text, crop)
        context, mask, pooled = self.text(text, text_mask)
        embedding = self.logsnr(logsnr) + pooled
        h, skips = self.input(x[0]), []
        for level in self.encoder:
            h, taken = _run(level, self.checkpoint_upper, h, embedding)
            skips.append(taken)
        h = self.trunk(h, embedding, context, mask)
        for decoder in self.upper:
            h = _run(decoder, self.checkpoint_upper, h, [skips.pop()], embedding)
        return [self.heads[0](h)]


Network = LayeredUNet | SingleScaleUNet
"""Either kind; both are called alike."""


def make_network(config: UNetConfig) -> Network:
    """A fresh network of the configuration's kind."""
    return LayeredUNet(config) if config.kind == "layered" else SingleScaleUNet(config)


def _levels_up(config: UNetConfig) -> list[tuple[int, int]]:
    """Width and number of blocks of each level above the trunk, low to high."""
    upper = config.num_upper_levels
    return list(zip(config.channels[:upper], config.blocks[:upper], strict=True))[::-1]


def _check_kind(config: UNetConfig, kind: str) -> None:
    if config.kind != kind:
        raise ValueError(
            f"kind={config.kind!r} must be {kind!r} here; call make_network for either"
        )


def _run(part: Callable[..., Any], recompute: bool, *args: Any) -> Any:
    """A part's result; kept alone, without what led to it, where that shall be computed again on the way back."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
    return part(*args)
