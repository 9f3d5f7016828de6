"""How much noise at which time: the cosine schedule, shifted for each layer.

With ``x_t = alpha x0 + sigma eps`` and ``alpha^2 + sigma^2 = 1``, the schedule is ``logsnr(t) = ln(alpha^2 / sigma^2)``.
The reference is the cosine of Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), in continuous time

    logsnr_ref(t) = -2 ln tan(pi t / 2),   clipped once to [logsnr_min, logsnr_max]

and layer l of resolution d_l is shifted as in simple diffusion (Hoogeboom et al. 2023, https://arxiv.org/abs/2301.11093, eq. 5)

    logsnr_l(t) = logsnr_ref(t) + 2 ln(d_ref / d_l) + extra_l

Averaging k x k pixels multiplies the signal-to-noise ratio by k^2; the shift makes up for exactly that. With ``extra = 0``
the low layer's noisy picture is therefore a rescaled downscale of the high layer's: the pyramid is one diffusion.
Clipping before the shift, never after, keeps this exact at both ends. Called by `diffusion` and `sampler`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_logsnr(
    t: Float[Tensor, "*b"], logsnr_min: float, logsnr_max: float
) -> Float[Tensor, "*b"]:
    """``logsnr_ref`` at times in [0, 1], 0 being clean; falls from ``logsnr_max`` to ``logsnr_min``."""
    # tan's argument stays inside (0, pi/2): the clip of the logsnr is done on the angle, where it cannot overflow.
    low = 2.0 / math.pi * math.atan(math.exp(-0.5 * logsnr_max))
    high = 2.0 / math.pi * math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(0.5 * math.pi * t.clamp(low, high)))


def time_of(logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The time at which the unclipped cosine has this logsnr."""
    return 2.0 / math.pi * torch.atan(torch.exp(-0.5 * logsnr))


def layer_shift(resolution: int, reference_resolution: int) -> float:
    """``2 ln(d_ref / d)``: negative (noisier at equal t) for pictures larger than the reference."""
    return 2.0 * math.log(reference_resolution / resolution)


def alpha_sigma(logsnr: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """``alpha`` and ``sigma`` of a variance-preserving process at the given logsnr."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
