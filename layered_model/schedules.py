"""How much noise at which time: the cosine schedule, plain or interpolated, shifted for each layer.

With ``x_t = alpha x0 + sigma eps`` and ``alpha^2 + sigma^2 = 1``, the schedule is ``logsnr(t) = ln(alpha^2 / sigma^2)``.
The reference is the cosine of Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), in continuous time

    logsnr_ref(t) = -2 ln tan(pi t / 2),   clipped once to [logsnr_min, logsnr_max]

and layer l of resolution d_l is shifted as in simple diffusion (Hoogeboom et al. 2023, https://arxiv.org/abs/2301.11093, eq. 5)

    logsnr_l(t) = logsnr_ref(t) + 2 ln(d_ref / d_l) + extra_l

Averaging k x k pixels multiplies the signal-to-noise ratio by k^2; the shift makes up for exactly that. With ``extra = 0``
the low layer's noisy picture is therefore a rescaled downscale of the high layer's: the pyramid is one diffusion.
Clipping before the shift, never after, keeps this exact at both ends.

The interpolated schedule (eq. 6) goes from the shift of ``d_detail >= d_ref`` at t = 0 to that of d_ref at t = 1: as noisy for
the composition, less noisy while details are drawn. The difference of the two shifts does not depend on the layer, so all of it
is a bend of the reference, and the layers' shifts stay the constants that they are:

    logsnr_ref(t) = -2 ln tan(pi t / 2) + (1 - t) bend,   bend = 2 ln(d_detail / d_ref)

Called by `diffusion` and `sampler`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_logsnr(
    t: Float[Tensor, "*b"], logsnr_min: float, logsnr_max: float, bend: float = 0.0
) -> Float[Tensor, "*b"]:
    """``logsnr_ref`` at times in [0, 1], 0 being clean; falls from ``logsnr_max`` to ``logsnr_min``.

    Raises:
        ValueError: if the times are no floats, or NaN (which is looked for on the CPU only), or the bend is negative.
    """
    _check_times(t)
    if not 0.0 <= bend < math.inf:
        raise ValueError(f"bend={bend} must be finite and not negative")
    inside = t.clamp(*_clips(logsnr_min - bend, logsnr_max))
    logsnr = -2.0 * torch.log(torch.tan(0.5 * math.pi * inside))
    return (logsnr + (1.0 - t) * bend).clamp(logsnr_min, logsnr_max) if bend else logsnr


def time_of(logsnr: Float[Tensor, "*b"], bend: float = 0.0) -> Float[Tensor, "*b"]:
    """The time at which the unclipped reference has this logsnr."""
    time = 2.0 / math.pi * torch.atan(torch.exp(-0.5 * logsnr))
    if not bend:
        return time
    # The plain cosine at the time sought lies in [logsnr - bend, logsnr]; halve that until float64 ends.
    early, late = time.double(), time_of(logsnr.double() - bend)
    for _ in range(64):
        middle = 0.5 * (early + late)
        above = -2.0 * torch.log(torch.tan(0.5 * math.pi * middle)) + (1.0 - middle) * bend > logsnr
        early, late = torch.where(above, middle, early), torch.where(above, late, middle)
    return (0.5 * (early + late)).to(logsnr.dtype)


def clipped_outside(logsnr_min: float, logsnr_max: float, bend: float = 0.0) -> tuple[float, float]:
    """The times between which ``logsnr_ref`` is not clipped."""
    ends = torch.tensor([logsnr_max, logsnr_min], dtype=torch.float64)
    early, late = time_of(ends, bend).tolist()
    return early, late


def relative_slope(
    t: Float[Tensor, "*b"], inside: tuple[float, float], bend: float = 0.0
) -> Float[Tensor, "*b"]:
    """``-dlogsnr_ref / dt`` over 2 pi, the plain cosine's in its middle; constant outside of `clipped_outside`."""
    _check_times(t)
    inner = t.clamp(*inside)
    return 1.0 / torch.sin(math.pi * inner) + bend / (2.0 * math.pi)


def layer_shift(resolution: int, reference_resolution: int) -> float:
    """``2 ln(d_ref / d)``: negative (noisier at equal t) for pictures larger than the reference."""
    for name, value in (("resolution", resolution), ("reference_resolution", reference_resolution)):
        if value < 1:
            raise ValueError(f"{name}={value} must be positive")
    return 2.0 * math.log(reference_resolution / resolution)


def alpha_sigma(logsnr: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """``alpha`` and ``sigma`` of a variance-preserving process at the given logsnr."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def _clips(logsnr_min: float, logsnr_max: float) -> tuple[float, float]:
    """The plain cosine's times of both clips: on the angle, inside (0, pi/2), the tangent cannot overflow."""
    low, high = (
        2.0 / math.pi * math.atan(math.exp(-0.5 * end)) for end in (logsnr_max, logsnr_min)
    )
    return low, high


def _check_times(t: Tensor) -> None:
    """Times are floats in [0, 1]; values on an accelerator are not read, which would make it wait."""
    if not t.is_floating_point():
        raise ValueError(f"t has dtype {t.dtype}, but times are floats in [0, 1]")
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ~((t >= 0) & (t <= 1))
        if outside.any():
            raise ValueError(f"t holds {t[outside][0].item()}, but times lie in [0, 1], 0 is clean")
