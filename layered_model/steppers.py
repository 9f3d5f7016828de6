"""From one noise level to the next: one class a solver, one `step` each.

With ``lambda = logsnr / 2``, a step from t to a cleaner s, of length ``h = lambda_s - lambda_t``:

    DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16); DDPM, the ancestral sampler, is eta = 1
        eps^ = (x_t - alpha_t x^) / sigma_t
        sigma_up = eta (sigma_s / sigma_t) sqrt(1 - (alpha_t / alpha_s)^2)
        x_s  = alpha_s x^ + sqrt(sigma_s^2 - sigma_up^2) eps^ + sigma_up n
    DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2) for eta = 0, its SDE for eta = 1
        d    = x^ + (x^ - x^_before) h / (2 h_before)
        x_s  = (sigma_s / sigma_t) exp(-eta h) x_t - alpha_s (exp(-(1 + eta) h) - 1) d + sigma_s sqrt(1 - exp(-2 eta h)) n
    Heun (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1), on ``x / alpha`` over ``sigma / alpha``
        x_s' = alpha_s x^ + sigma_s eps^                                        DDIM; then the network answers at (x_s', s)
        x_s  = x_s' + (sigma_s - sigma_t alpha_s / alpha_t) (eps^_s - eps^_t) / 2

All are linear in pictures and noise, with coefficients that depend on h alone once ``x / alpha`` is looked at. So they commute
with the downscale: layers that begin as one picture stay one. Called by `sampler`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from layered_model.diffusion import Level

SamplerKind = Literal["dpmpp_2m", "ddim", "dpmpp_2m_sde", "ddpm", "heun"]
Picture = Float[Tensor, "b c h w"]
LayerPicture = Float[Tensor, "b c _h _w"]
"""Of a list of several resolutions."""


@runtime_checkable
class Stepper(Protocol):
    """Moves one layer's state; one instance serves one layer of one batch."""

    @property
    def needs_noise(self) -> bool:
        """Whether a step takes fresh noise."""

    @property
    def evaluations(self) -> int:
        """Estimates that a step takes. The second is asked for at its end: a step from s to s."""

    def step(
        self, x_t: Picture, x0_hat: Picture, t: Level, s: Level, noise: Picture | None
    ) -> Picture:
        """``x_s`` from ``x_t`` and the estimate of the clean picture."""


@dataclass
class DDIM:
    """Deterministic for ``eta = 0``; ancestral DDPM for ``eta = 1``."""

    eta: float = 0.0
    evaluations: ClassVar[int] = 1

    @property
    def needs_noise(self) -> bool:
        """Whether a step takes fresh noise."""
        return self.eta > 0

    def step(
        self, x_t: Picture, x0_hat: Picture, t: Level, s: Level, noise: Picture | None
    ) -> Picture:
        """See the module's formula."""
        eps_hat = (x_t - t.alpha * x0_hat) / t.sigma
        remaining = (1 - (t.alpha / s.alpha).square()).clamp(min=0).sqrt()
        sigma_up = self.eta * s.sigma / t.sigma * remaining
        kept = (s.sigma.square() - sigma_up.square()).clamp(min=0).sqrt()
        x_s = s.alpha * x0_hat + kept * eps_hat
        return x_s if noise is None else x_s + sigma_up * noise


@dataclass
class DPMSolverPP2M:
    """Second-order multistep solver of the flow (``eta = 0``) or of the SDE (``eta = 1``); its first step is DDIM's or DDPM's."""

    eta: float = 0.0
    evaluations: ClassVar[int] = 1
    before: tuple[Picture, Tensor] | None = field(default=None, init=False)

    @property
    def needs_noise(self) -> bool:
        """Whether a step takes fresh noise."""
        return self.eta > 0

    def step(
        self, x_t: Picture, x0_hat: Picture, t: Level, s: Level, noise: Picture | None
    ) -> Picture:
        """See the module's formula."""
        h = (s.alpha / s.sigma).log() - (t.alpha / t.sigma).log()
        direction = x0_hat
        if self.before is not None:
            x0_before, h_before = self.before
            direction = x0_hat + (x0_hat - x0_before) * (h / (2 * h_before))
        self.before = (x0_hat, h)
        kept = s.sigma / t.sigma * torch.exp(-self.eta * h)
        x_s = kept * x_t - s.alpha * torch.expm1(-(1 + self.eta) * h) * direction
        if noise is None:
            return x_s
        return x_s + s.sigma * (-torch.expm1(-2 * self.eta * h)).sqrt() * noise


@dataclass
class Heun:
    """The trapezoid of the slopes at both ends: second order, without a memory of the steps before."""

    needs_noise: ClassVar[bool] = False
    evaluations: ClassVar[int] = 2
    predicted: tuple[Picture, Tensor] | None = field(default=None, init=False)

    def step(
        self, x_t: Picture, x0_hat: Picture, t: Level, s: Level, noise: Picture | None
    ) -> Picture:
        """By turns the prediction from t to s, and its correction at s, where t is s."""
        eps_hat = (x_t - t.alpha * x0_hat) / t.sigma
        if self.predicted is None:
            self.predicted = (eps_hat, s.sigma - t.sigma * s.alpha / t.alpha)
            return s.alpha * x0_hat + s.sigma * eps_hat
        eps_before, length = self.predicted
        self.predicted = None
        return x_t + length * (eps_hat - eps_before) / 2


def make_stepper(kind: SamplerKind, eta: float | None = None) -> Stepper:
    """A fresh stepper.

    Args:
        kind: Which solver.
        eta: Fresh noise per step for 'ddim', from 0 (none, the default) to 1 (DDPM); None for the others.

    Raises:
        ValueError: if the kind is unknown, or has no eta.
    """
    if eta is not None and kind != "ddim":
        raise ValueError(f"eta={eta} means something to sampler 'ddim' only, not to {kind!r}")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be from 0 to 1")
    match kind:
        case "dpmpp_2m":
            return DPMSolverPP2M()
        case "ddim":
            return DDIM(eta or 0.0)
        case "dpmpp_2m_sde":
            return DPMSolverPP2M(eta=1.0)
        case "ddpm":
            return DDIM(eta=1.0)
        case "heun":
            return Heun()
    raise ValueError(f"sampler {kind!r} is unknown; use one of {get_args(SamplerKind)}")
