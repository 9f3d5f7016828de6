"""How much each noise level counts in training, and which times are drawn.

With ``SNR = exp(logsnr)`` and for a variance-preserving process (errors between true and estimated)

    |v error|^2 = |x0 error|^2 / sigma^2,    |eps error|^2 = SNR |x0 error|^2

so every weighting can be put as a factor on the v-error, averaged over even times:

* ``flat``: 1.
* ``min_snr``: ``min(SNR, 5) / (SNR + 1)``; Hang et al. 2023, https://arxiv.org/abs/2303.09556.
* ``sigmoid``: ``sigmoid(b - logsnr)`` on the eps-error, averaged over even *logsnr* (Kingma & Gao 2023,
  https://arxiv.org/abs/2303.00848, eq. 2; Hoogeboom et al. 2024, https://arxiv.org/abs/2410.19324). Over even times that is

      -dlogsnr/dt sigmoid(b - logsnr) SNR / (SNR + 1)    on the v-error,

  so that the schedule decides where training looks, but not what it counts. With the layer's own logsnr, and its own bias
  ``b = -3 + 2 ln(512 / d)``: the -3 that is in use for 512 pixels, moved as the schedule is, which makes the weight of a time the
  same for all layers of one diffusion. The slope is taken relative to 2 pi; a constant factor means nothing.

Called by `diffusion`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layered_model.parametrization import Prediction
from layered_model.schedules import layer_shift

Weighting = Literal["flat", "min_snr", "sigmoid"]
MIN_SNR_GAMMA = 5.0
SIGMOID_BIAS = -3.0
"""At 512 pixels."""


def sigmoid_bias(resolution: int) -> float:
    """Logsnr above which details of pictures of this size count less and less."""
    return SIGMOID_BIAS + layer_shift(resolution, 512)


def v_weight(
    weighting: Weighting,
    logsnr: Float[Tensor, " b"],
    slope: Float[Tensor, " b"],
    resolution: int,
) -> Float[Tensor, " b"]:
    """The factor on the squared v-error.

    Args:
        weighting: which.
        logsnr: the layer's own.
        slope: ``-dlogsnr/dt`` over 2 pi.
        resolution: the layer's.
    """
    if weighting == "flat":
        return torch.ones_like(logsnr)
    if weighting == "min_snr":
        return logsnr.exp().clamp(max=MIN_SNR_GAMMA) * torch.sigmoid(-logsnr)
    return slope * torch.sigmoid(sigmoid_bias(resolution) - logsnr) * torch.sigmoid(logsnr)


def output_weight(
    weighting: Weighting,
    prediction: Prediction,
    logsnr: Float[Tensor, " b"],
    slope: Float[Tensor, " b"],
    resolution: int,
) -> Float[Tensor, " b"]:
    """The same weighting as a factor on the squared error of what the network outputs."""
    weight = v_weight(weighting, logsnr, slope, resolution)
    if prediction == "x0":
        return weight / torch.sigmoid(-logsnr)
    return weight / torch.sigmoid(logsnr) if prediction == "eps" else weight


def stratified_times(
    first: int, count: int, total: int, generator: torch.Generator
) -> Float[Tensor, " {count}"]:
    """Times of pictures ``first ... first + count - 1`` of a global batch: one in each of ``total`` equal strata of [0, 1].

    Every rank passes a generator in the same state, so that strata are shared out without communication; they are shuffled,
    so that a picture's place in the batch says nothing about its time.

    Raises:
        ValueError: if the pictures are not part of the batch.
    """
    if not 0 <= first <= first + count <= total:
        raise ValueError(f"first={first}, count={count} must lie within a batch of total={total}")
    order = torch.randperm(total, generator=generator, device=generator.device)
    jitter = torch.rand(total, generator=generator, device=generator.device)
    return ((order + jitter) / total)[first : first + count]
