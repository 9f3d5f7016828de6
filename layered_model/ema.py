"""Exponential moving average of the weights with a width relative to the length of training.

The power-function profile of Karras et al. 2024 (https://arxiv.org/abs/2312.02696, eq. 121 to 127): after step t

    w_ema <- beta_t w_ema + (1 - beta_t) w,     beta_t = (1 - 1/t)^(gamma + 1)

averages over a window that grows with t, so one setting fits a run of two minutes and one of two weeks. The width
``sigma_rel`` is the standard deviation of the profile relative to t:

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

Called by the training stage after each optimizer step.
"""

import numpy as np
import torch
from torch import Tensor, nn


def gamma_of(relative_width: float) -> float:
    """The exponent gamma of a relative width, for example 6.94 for 0.10.

    Raises:
        ValueError: if the width lies outside (0, 0.28].
    """
    if not 0.0 < relative_width <= 0.28:
        raise ValueError(f"relative width {relative_width} must lie in (0, 0.28]")

    # sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, expanded; the largest real root is the one >= 0.
    inverse = relative_width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class PowerEMA:
    """Averaged copy of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, relative_width: float = 0.1) -> None:
        self.exponent = gamma_of(relative_width) + 1.0
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after one optimizer step."""
        self.num_updates += 1
        weight = 1.0 - (1.0 - 1.0 / self.num_updates) ** self.exponent
        current = module.state_dict()
        floats = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in floats], [current[name] for name in floats], weight
        )
        for name in self.weights.keys() - set(floats):
            self.weights[name].copy_(current[name])

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on: the averaged weights and the number of updates."""
        return {"num_updates": self.num_updates, "weights": self.weights}

    def load_state_dict(self, num_updates: int, weights: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.num_updates = num_updates
        for name, value in self.weights.items():
            value.copy_(weights[name])
