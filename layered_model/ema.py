"""Exponential moving averages of the weights, and averages of any width made afterwards from snapshots of two.

The power-function profile of Karras et al. 2024 (https://arxiv.org/abs/2312.02696, eq. 121 to 127): after step t

    w_ema <- beta_t w_ema + (1 - beta_t) w,     beta_t = (1 - 1/t)^(gamma + 1)

averages over a window that grows with t, so one setting fits a run of two minutes and one of two weeks. The width
``sigma_rel`` is the standard deviation of the profile relative to t:

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t],     sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

**Afterwards** (section 3): an average is linear in the weights, so a sum of averages has the sum of their profiles. Of a wanted
profile p the nearest such sum over snapshots i takes the x that minimize ``integral (p - sum x_i p_i)^2 dtau``, with
``sum x_i = 1``, which keeps constant weights exact. With inner products in closed form, for ``t_i <= t_j``,

    <p_i, p_j> = (gamma_i + 1)(gamma_j + 1) / (gamma_i + gamma_j + 1) (t_i / t_j)^gamma_j / t_j

that is one small linear system. Only ratios of times matter: they may count steps or pictures.

`DecayEMA` is the plain average with a fixed decay. Called by the training stage after each optimizer step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

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


class _Average:
    """Averaged copy of a module's parameters and buffers; integers are taken as they are."""

    def __init__(self, module: nn.Module) -> None:
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    def beta(self, update: int) -> float:
        """What is kept of the average at the given update, counted from 1."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights after one optimizer step.

        Raises:
            ValueError: if the module's weights have other names or shapes.
        """
        current = module.state_dict()
        _check_alike(self.weights, current)
        self.num_updates += 1
        weight = 1.0 - self.beta(self.num_updates)
        floats = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[name] for name in floats], [current[name] for name in floats], weight
        )
        for name in self.weights.keys() - set(floats):
            self.weights[name].copy_(current[name])

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on: the averaged weights and the number of updates."""
        return {"num_updates": self.num_updates, "weights": self.weights}

    def load_state_dict(self, num_updates: int, weights: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: if the weights have other names or shapes, or the number of updates is negative.
        """
        if num_updates < 0:
            raise ValueError(f"num_updates={num_updates} must not be negative")
        _check_alike(self.weights, weights)
        self.num_updates = num_updates
        for name, value in self.weights.items():
            value.copy_(weights[name])


class PowerEMA(_Average):
    """Average with a power-function profile of the given relative width."""

    def __init__(self, module: nn.Module, relative_width: float = 0.1) -> None:
        super().__init__(module)
        self.relative_width = relative_width
        self.exponent = gamma_of(relative_width) + 1.0

    def beta(self, update: int) -> float:
        """``(1 - 1/t)^(gamma + 1)``."""
        return (1.0 - 1.0 / update) ** self.exponent


class DecayEMA(_Average):
    """Plain average: ``beta = decay``, but ``(t - 1) / (t + 9)`` as long as that is less, so that the start is soon forgotten."""

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} must lie in [0, 1)")
        super().__init__(module)
        self.decay = decay

    def beta(self, update: int) -> float:
        """The decay, after a warm-up that begins with 0: the first update forgets the initial weights."""
        return min(self.decay, (update - 1) / (update + 9))


class Profile(NamedTuple):
    """Which power-function average: its relative width, and the time it was taken at, in steps or in pictures."""

    relative_width: float
    time: float


def reconstruction(snapshots: Sequence[Profile], wanted: Profile) -> list[float]:
    """How much of each snapshot makes the wanted profile; the shares sum to 1.

    Args:
        snapshots: profiles of the averages that were kept, of one or more widths.
        wanted: its time is at most the last snapshot's.

    Raises:
        ValueError: if there is no snapshot, one comes twice, a width or time is impossible, or the wanted time lies beyond.
    """
    if not snapshots or len(set(snapshots)) < len(snapshots):
        raise ValueError(f"snapshots={list(snapshots)} must be distinct, and at least one")
    for profile in (*snapshots, wanted):
        if not 0.0 < profile.time < math.inf:
            raise ValueError(f"time {profile.time} of a profile must be positive and finite")
    last = max(snapshot.time for snapshot in snapshots)
    if wanted.time > last:
        raise ValueError(f"time {wanted.time} must not lie beyond the last snapshot's, {last}")
    gamma = np.array([gamma_of(profile.relative_width) for profile in (*snapshots, wanted)])
    time = np.array([profile.time for profile in (*snapshots, wanted)]) / last
    gram = _inner_products(gamma, time)
    count = len(snapshots)
    # Stationary point of the squared distance with a multiplier for the sum. Neighbouring snapshots are nearly parallel, so
    # the solver may leave out directions below float64's resolution.
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = gram[:count, :count]
    system[count, count] = 0.0
    right = np.append(gram[:count, count], 1.0)
    shares: list[float] = np.linalg.lstsq(system, right)[0][:count].tolist()
    return shares


def _inner_products(gamma: np.ndarray, time: np.ndarray) -> np.ndarray:
    """``<p_i, p_j>`` of all pairs of profiles."""
    first, second = np.meshgrid(np.arange(len(time)), np.arange(len(time)), indexing="ij")
    earlier = np.where(time[first] <= time[second], first, second)
    later = np.where(time[first] <= time[second], second, first)
    scale = (gamma[earlier] + 1) * (gamma[later] + 1) / (gamma[earlier] + gamma[later] + 1)
    ratio = time[earlier] / time[later]
    products: np.ndarray = scale * ratio ** gamma[later] / time[later]
    return products


def combine(
    shares: Sequence[float], snapshots: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The weighted sum of snapshots, one in memory at a time; integers are the last one's.

    Args:
        shares: see `reconstruction`.
        snapshots: weights by name, in the order of the shares.

    Raises:
        ValueError: if the snapshots are not as many as the shares, none, or differ in names or shapes.
    """
    total: dict[str, Tensor] = {}
    for share, weights in zip(shares, snapshots, strict=True):
        if not total:
            total = {
                name: torch.zeros_like(value, dtype=_accumulator(value))
                for name, value in weights.items()
            }
        _check_alike(total, weights)
        for name, value in weights.items():
            if value.is_floating_point():
                total[name].add_(value.to(total[name].dtype), alpha=share)
            else:
                total[name].copy_(value)
    if not total:
        raise ValueError("snapshots must hold at least one")
    return total


def _accumulator(value: Tensor) -> torch.dtype:
    """Halves are summed in float32."""
    return (
        torch.promote_types(value.dtype, torch.float32)
        if value.is_floating_point()
        else value.dtype
    )


def _check_alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Two sets of weights must have the same names and shapes."""
    if different := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"weights {different[:3]} are in one of the two only: another network's?")
    for name, value in ours.items():
        if value.shape != theirs[name].shape:
            raise ValueError(
                f"weight {name!r} has shape {tuple(theirs[name].shape)}, the average's has "
                f"{tuple(value.shape)}: another network's?"
            )
