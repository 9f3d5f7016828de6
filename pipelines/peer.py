"""The peer in measurements: diffusers' `UNet2DConditionModel` with as many multiply-adds as a network of ours.

It gets the resolution, the levels, the blocks and transformer blocks of each level, the head width, and width and number of the
text tokens of our configuration. Its own habits stay: one more block in each level of the decoder than of the encoder, gated
feed-forwards, its text straight from the encoder. What is left to choose are the widths w: multiples of what vector units like
(16, or half a head's width where there is attention), rising from level to level, with as many multiply-adds as wanted, and of
those the ones most nearly proportional to ours.

As long as widths rise, multiply-adds are a polynomial of degree 2 in them, so that a few counts give all (Newton's forward
differences, w = w0 + 8 x):

    M(w) = M + sum_i x_i D_i M + sum_i x_i (x_i - 1) / 2 D_ii M + sum_i<j x_i x_j D_ij M

Called by `bench` and `contenders`.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layered_model.unet import UNetConfig
from pipelines.config import UserError
from pipelines.costs import macs

TOLERANCE = 0.02
"""Largest relative difference of multiply-adds that counts as equal."""
NEAR = 0.01
"""Of shapes this near, the one most like ours is taken."""
SPACING = 8
"""Of the widths that are counted."""
Widths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """A shape of the peer and what it costs."""

    widths: Widths
    "``block_out_channels``, from the highest level down as ours."
    macs: int
    "Multiply-adds of one picture."


def require() -> None:
    """Refuses to go on without diffusers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise UserError("bench compares with diffusers: pip install '.[bench]'") from error


def make(config: UNetConfig, widths: Widths) -> nn.Module:
    """A peer of these widths with everything else from a configuration of ours."""
    from diffusers import UNet2DConditionModel

    upper = config.num_upper_levels
    transformers = (0,) * upper + config.attention
    crossed = [bool(count) for count in transformers]
    unet: Any = UNet2DConditionModel
    network: nn.Module = unet(
        sample_size=config.resolutions[-1],
        in_channels=config.picture_channels,
        out_channels=config.picture_channels,
        down_block_types=["CrossAttnDownBlock2D" if x else "DownBlock2D" for x in crossed],
        up_block_types=["CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(crossed)],
        block_out_channels=widths,
        layers_per_block=config.blocks,
        transformer_layers_per_block=[max(count, 1) for count in transformers],
        attention_head_dim=[width // math.gcd(width, config.head_width) for width in widths],
        cross_attention_dim=config.text_width,
        norm_num_groups=math.gcd(32, *widths),
        dropout=config.dropout,
    )
    return network


def call(network: nn.Module, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    """What the peer predicts for a noisy picture."""
    output: Tensor = network(x, step, encoder_hidden_states=text, return_dict=False)[0]
    return output


def count(config: UNetConfig, widths: Widths, num_tokens: int) -> int:
    """Multiply-adds of a peer of these widths for one picture."""
    top = config.resolutions[-1]
    with torch.device("meta"):
        network = make(config, widths)
        x = torch.empty(1, config.picture_channels, top, top)
        text = torch.empty(1, num_tokens, config.text_width)
        return macs(lambda: call(network, x, torch.empty(1), text))


def match(config: UNetConfig, goal: int, num_tokens: int) -> Match:
    """The shape most like ours that costs `goal` multiply-adds.

    Raises:
        UserError: no shape comes within `TOLERANCE`.
    """
    cost = _polynomial(config.channels, lambda widths: count(config, widths, num_tokens))
    shapes = {widths: abs(cost(widths) / goal - 1) for widths in _rising(config)}
    near = [widths for widths, miss in shapes.items() if miss <= NEAR]
    best = (
        min(near, key=lambda widths: _disproportion(widths, config.channels))
        if near
        else min(shapes, key=lambda widths: shapes[widths])
    )
    counted = count(config, best, num_tokens)
    if abs(counted / goal - 1) > TOLERANCE:
        raise UserError(
            f"no UNet2DConditionModel has {goal / 1e9:.2f} GMAC within {TOLERANCE:.0%}; "
            f"the nearest, {best}, has {counted / 1e9:.2f}"
        )
    return Match(best, counted)


def _polynomial(base: Widths, measure: Callable[[Widths], int]) -> Callable[[Widths], float]:
    """A function of degree 2 from its values near a base; see the module's formula."""

    def at(*levels: int) -> int:
        moved = list(base)
        for level in levels:
            moved[level] += SPACING
        return measure(tuple(moved))

    indices = range(len(base))
    zero, one = at(), [at(i) for i in indices]
    two = {
        (i, j): at(i, j) - one[i] - one[j] + zero
        for i, j in itertools.combinations_with_replacement(indices, 2)
    }

    def value(widths: Widths) -> float:
        x = [(new - old) / SPACING for new, old in zip(widths, base, strict=True)]
        linear = sum(x[i] * (one[i] - zero) for i in indices)
        return (
            zero
            + linear
            + sum(
                second * (x[i] * (x[i] - 1) / 2 if i == j else x[i] * x[j])
                for (i, j), second in two.items()
            )
        )

    return value


def _rising(config: UNetConfig) -> Iterator[Widths]:
    """Widths from 5/8 to 5/4 of ours that rise from level to level."""
    attended = (0,) * config.num_upper_levels + config.attention
    choices = []
    for width, count in zip(config.channels, attended, strict=True):
        step = max(16, config.head_width // 2) if count else 16
        choices.append(range(-(-width * 5 // 8 // step) * step, width * 5 // 4 + 1, step))
    for widths in itertools.product(*choices):
        if all(a < b for a, b in itertools.pairwise(widths)):
            yield widths


def _disproportion(widths: Widths, ours: Widths) -> float:
    """How far two shapes are from proportional: the variance of the logarithm of their ratio."""
    logs = (math.log(a / b) for a, b in zip(widths, ours, strict=True))
    return statistics.pvariance(logs)
