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
) -> Float[Tensor, "b c h w"]:
    """One unit Gaussian field per generator, drawn on the generator's device."""
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
    """
    if noise == "independent":
        return [draw(resolution) for resolution in resolutions]
    eps_top = draw(resolutions[-1])
    return [project(eps_top, resolution, kernel_of(noise)) for resolution in resolutions]
