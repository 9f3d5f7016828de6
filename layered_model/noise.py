"""Noise for every layer at once.

* ``sinc`` (the paper's): one white field at the top, ``eps_l = P eps_top`` with the sinc projection of `resample`.
* ``periodic``, ``box``: the same with the cropped FFT, or with average pooling.
* ``independent``: a fresh field per layer, as in Matryoshka Diffusion (https://arxiv.org/abs/2310.15111).

Each picture draws from its own ``torch.Generator``, so it depends on its seed and not on its batch. Called by `diffusion`
(training) and `sampler`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layered_model.resample import Kernel, project

NoiseKind = Literal["sinc", "periodic", "box", "independent"]


def kernel_of(noise: NoiseKind) -> Kernel:
    """The resampling kernel that pictures must share with this noise (sinc where the noise has none)."""
    return "sinc" if noise == "independent" else noise


def white_noise(
    generators: Sequence[torch.Generator], channels: int, resolution: int
) -> Float[Tensor, "b {channels} {resolution} {resolution}"]:
    """One unit Gaussian field per generator, drawn on the generator's device.

    Raises:
        ValueError: if there is no generator, channel or pixel.
    """
    if not generators or channels < 1 or resolution < 1:
        raise ValueError(
            f"{len(generators)} generators, channels={channels}, resolution={resolution} must all be "
            "at least 1"
        )
    shape = (channels, resolution, resolution)
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def noise_pyramid(
    draw: Callable[[int], Float[Tensor, "b c _h _w"]], resolutions: Sequence[int], noise: NoiseKind
) -> list[Float[Tensor, "b c _h _w"]]:
    """Noise of every layer, low to high, each white with variance 1.

    Args:
        draw: Returns fresh unit white noise of a resolution.
        resolutions: Pixels of a side, low to high.
        noise: How the layers are related.

    Raises:
        ValueError: if the resolutions do not rise, or `draw` returns another shape than it was asked for.
    """
    if not resolutions or list(resolutions) != sorted(set(resolutions)) or resolutions[0] < 1:
        raise ValueError(f"resolutions={tuple(resolutions)} must rise from at least 1, low to high")
    if noise == "independent":
        return [_drawn(draw, resolution) for resolution in resolutions]
    eps_top = _drawn(draw, resolutions[-1])
    return [project(eps_top, resolution, kernel_of(noise)) for resolution in resolutions]


def _drawn(
    draw: Callable[[int], Float[Tensor, "b c h w"]], resolution: int
) -> Float[Tensor, "b c h w"]:
    eps = draw(resolution)
    if eps.ndim != 4 or eps.shape[-2:] != (resolution, resolution) or not eps.is_floating_point():
        raise ValueError(
            f"draw({resolution}) returned {eps.dtype} of shape {tuple(eps.shape)}; it must be floating "
            f"point of shape [b, c, {resolution}, {resolution}]"
        )
    return eps
