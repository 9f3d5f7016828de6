"""What the network predicts and how it turns into the other two.

With ``x_t = alpha x0 + sigma eps`` (variance-preserving) and ``v = alpha eps - sigma x0`` (Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512, section 4):

    x0 = alpha x_t - sigma v         eps = sigma x_t + alpha v

`alpha` and `sigma` broadcast over the picture (shape ``[b, 1, 1, 1]``). Called by `diffusion` and `denoiser`.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Prediction = Literal["v", "x0", "eps"]
Picture = Float[Tensor, "b c h w"]
Scale = Float[Tensor, "#b 1 1 1"]


def target(kind: Prediction, x0: Picture, eps: Picture, alpha: Scale, sigma: Scale) -> Picture:
    """What a perfect network of this kind would output."""
    if kind == "v":
        return alpha * eps - sigma * x0
    return x0 if kind == "x0" else eps


def to_x0(kind: Prediction, output: Picture, x_t: Picture, alpha: Scale, sigma: Scale) -> Picture:
    """The clean picture that an output stands for."""
    if kind == "v":
        return alpha * x_t - sigma * output
    return output if kind == "x0" else (x_t - sigma * output) / alpha


def to_eps(kind: Prediction, output: Picture, x_t: Picture, alpha: Scale, sigma: Scale) -> Picture:
    """The noise that an output stands for."""
    if kind == "v":
        return sigma * x_t + alpha * output
    return output if kind == "eps" else (x_t - alpha * output) / sigma
