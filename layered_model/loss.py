"""How much each noise level counts in training, and which times are drawn.

With ``SNR = exp(logsnr)`` and for a variance-preserving process (errors between true and estimated)

    |v error|^2 = |x0 error|^2 / sigma^2,    |eps error|^2 = SNR |x0 error|^2

so every weighting can be put as a factor on the v-error:

* ``flat``: 1.
* ``min_snr``: ``min(SNR, 5) / (SNR + 1)``; Hang et al. 2023, https://arxiv.org/abs/2303.09556.
* ``sigmoid``: ``sigmoid(b - logsnr)`` on the eps-error (Kingma & Gao 2023, https://arxiv.org/abs/2303.00848), that is,
  ``sigmoid(b - logsnr) SNR / (SNR + 1)`` on the v-error, with the layer's own logsnr.

Called by `diffusion`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layered_model.parametrization import Prediction

Weighting = Literal["flat", "min_snr", "sigmoid"]
MIN_SNR_GAMMA = 5.0
SIGMOID_BIAS = 3.0


def v_weight(weighting: Weighting, logsnr: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The factor on the squared v-error at a layer's logsnr."""
    if weighting == "flat":
        return torch.ones_like(logsnr)
    if weighting == "min_snr":
        return logsnr.exp().clamp(max=MIN_SNR_GAMMA) * torch.sigmoid(-logsnr)
    return torch.sigmoid(SIGMOID_BIAS - logsnr) * torch.sigmoid(logsnr)


def output_weight(
    weighting: Weighting, prediction: Prediction, logsnr: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """The same weighting as a factor on the squared error of what the network outputs."""
    weight = v_weight(weighting, logsnr)
    if prediction == "x0":
        return weight / torch.sigmoid(-logsnr)
    return weight / torch.sigmoid(logsnr) if prediction == "eps" else weight


def stratified_times(
    first: int, count: int, total: int, generator: torch.Generator
) -> Float[Tensor, " count"]:
    """Times of pictures ``first ... first + count - 1`` of a global batch: one in each of ``total`` equal strata of [0, 1].

    Every rank passes a generator in the same state, so that strata are shared out without communication; they are shuffled,
    so that a picture's place in the batch says nothing about its time.
    """
    order = torch.randperm(total, generator=generator, device=generator.device)
    jitter = torch.rand(total, generator=generator, device=generator.device)
    return ((order + jitter) / total)[first : first + count]
