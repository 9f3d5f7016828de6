"""The solvers alone, in float64, against known solutions and other libraries."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import scipy.integrate
import torch

from layered_model.schedules import alpha_sigma, cosine_logsnr
from layered_model.steppers import Level, SamplerKind, make_stepper

KINDS = get_args(SamplerKind)
FLOW = ["dpmpp_2m", "ddim", "heun"]


def level(t):
    alpha, sigma = alpha_sigma(cosine_logsnr(t.reshape(1, 1, 1, 1), -15, 15))
    return Level(alpha, sigma)


def levels_at(first, last, num_steps):
    return [level(t) for t in torch.linspace(first, last, num_steps + 1, dtype=torch.float64)]


def walk(stepper, x_t, levels, denoise, noise=None):
    """Every state on the way through the levels; `denoise(x_t, level, index)` and `noise(index)` say what a step needs."""
    states = [x_t]
    for index, (t, s) in enumerate(pairwise(levels)):
        for at in (t, s)[: stepper.evaluations]:
            fresh = noise(index) if noise and stepper.needs_noise else None
            x_t = stepper.step(x_t, denoise(x_t, at), at, s, fresh)
        states.append(x_t)
    return states


def gaussian(spread):
    """The exact denoiser of values of mean 0 and a deviation."""
    return lambda x, at: at.alpha * spread**2 / (at.alpha**2 * spread**2 + at.sigma**2) * x


# Exactness.


def flow_error(kind, num_steps, spread=0.5):
    """Relative error of a Gaussian's deviation between two times."""
    levels = levels_at(0.9, 0.1, num_steps)
    first, last = ((at.alpha**2 * spread**2 + at.sigma**2).sqrt() for at in levels[::num_steps])
    return abs(float(walk(make_stepper(kind), first, levels, gaussian(spread))[-1] / last - 1))


@pytest.mark.parametrize(("kind", "order"), [("dpmpp_2m", 2), ("heun", 2), ("ddim", 1)])
def test_the_error_falls_with_the_order_of_the_solver(kind, order):
    steps = np.array([40, 80, 160, 320])
    errors = [flow_error(kind, num_steps) for num_steps in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.05)
    assert errors[0] < (5e-2 if order == 1 else 2e-3)


def variance_error(kind, num_steps, eta=None, spread=0.5):
    """How far the drawn variance is from the Gaussian's, as a share of it.

    Exact: a solver is linear in its noise, so that row i of a batch shows what unit noise at step i comes to.
    """
    levels = levels_at(1, 0, num_steps)
    unit = torch.eye(num_steps + 1, dtype=torch.float64)[..., None, None, None]
    stepper = make_stepper(kind, eta)
    drawn = walk(stepper, unit[0], levels, gaussian(spread), lambda index: unit[index + 1])[-1]
    return abs(float(drawn.square().sum() / spread**2 - 1))


STOCHASTIC = [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", None), ("dpmpp_2m_sde", None)]


@pytest.mark.parametrize(("kind", "eta"), STOCHASTIC)
def test_the_variance_goes_to_the_gaussians(kind, eta):
    errors = [variance_error(kind, num_steps, eta) for num_steps in (100, 200, 400)]
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert coarse / fine > (4 if kind == "dpmpp_2m_sde" else 1.8)


@pytest.mark.parametrize("kind", FLOW)
def test_a_known_picture_is_reached_exactly(kind):
    # With the true x0 the path is alpha x0 + sigma eps, whatever the steps.
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    levels = [level(torch.tensor(t).double()) for t in (1.0, 0.7, 0.65, 0.3, 0.01, 0.0)]
    on_path = [at.alpha * x0 + at.sigma * eps for at in levels]
    drawn = walk(make_stepper(kind), on_path[0], levels, lambda _x, _at: x0)
    for one, other in zip(drawn, on_path, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("dpmpp_2m", 1e-4), ("heun", 1e-4), ("ddim", 2e-2)]
)
def test_steps_agree_with_a_general_ode_solver(kind, tolerance):
    # A mixture of two narrow Gaussians: the denoiser is not linear. d(x/alpha) / d(sigma/alpha) = (x - alpha x0_hat) / sigma.
    def mixture(x, alpha, sigma):
        variance = alpha**2 * 0.2**2 + sigma**2
        pull = np.tanh(alpha * x * 0.6 / variance)
        return 0.6 * pull + alpha * 0.2**2 / variance * (x - alpha * 0.6 * pull)

    def denoise(x, at):
        return torch.from_numpy(mixture(x.numpy(), at.alpha.numpy(), at.sigma.numpy()))

    def slope(noise, y):
        alpha = (1 + noise**2) ** -0.5
        return (y - mixture(alpha * y, alpha, alpha * noise)) / noise

    x_t = torch.tensor([-2.0, -0.3, 0.1, 0.4, 1.5], dtype=torch.float64).reshape(5, 1, 1, 1)
    levels = levels_at(0.95, 0.05, 400)
    span = [float(at.sigma / at.alpha) for at in (levels[0], levels[-1])]
    y = (x_t / levels[0].alpha).flatten().numpy()
    exact = scipy.integrate.solve_ivp(slope, span, y, rtol=1e-10, atol=1e-12).y[:, -1]
    drawn = walk(make_stepper(kind), x_t, levels, denoise)[-1] / levels[-1].alpha
    np.testing.assert_allclose(drawn.flatten(), exact, rtol=0, atol=tolerance)


# How they are related.


@pytest.mark.parametrize(
    ("kind", "other"), [("dpmpp_2m", "ddim"), ("heun", "ddim"), ("dpmpp_2m_sde", "ddpm")]
)
def test_the_first_step_is_that_of_first_order(kind, other):
    x_t, x0_hat, noise = torch.randn(3, 1, 3, 4, 4, dtype=torch.float64)
    t, s = level(torch.tensor(0.8).double()), level(torch.tensor(0.5).double())
    steppers = [make_stepper(kind), make_stepper(other)]
    steps = [each.step(x_t, x0_hat, t, s, noise if each.needs_noise else None) for each in steppers]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 1.0), ("ddpm", None)])
def test_a_full_ancestral_step_is_the_posterior(kind, eta):
    # q(x_s | x_t, x0) of a variance-preserving process, Ho et al. 2020, equation 7, in alpha and sigma.
    x_t, x0 = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    t, s = level(torch.tensor(0.8).double()), level(torch.tensor(0.5).double())
    ratio = t.alpha / s.alpha
    variance = t.sigma**2 - ratio**2 * s.sigma**2
    mean = ratio * s.sigma**2 / t.sigma**2 * x_t + s.alpha * variance / t.sigma**2 * x0
    deviation = (variance * s.sigma**2 / t.sigma**2).sqrt()
    stepper = make_stepper(kind, eta)
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    torch.testing.assert_close(stepper.step(x_t, x0, t, s, zero), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        stepper.step(x_t, x0, t, s, one), mean + deviation, rtol=0, atol=1e-12
    )


# Another library.


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own
@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False}),
        ("ddpm", "DDIMScheduler", {"clip_sample": False}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_diffusers_comes_to_the_same(kind, name, options):
    import diffusers

    scheduler = getattr(diffusers, name)(prediction_type="sample", **options)
    every = [level(t) for t in torch.linspace(0.001, 0.999, 1000, dtype=torch.float64)]
    scheduler.alphas_cumprod = torch.cat([at.alpha.flatten() for at in every]).square()
    scheduler.set_timesteps(20)
    levels = [every[int(step)] for step in scheduler.timesteps]
    fresh = torch.randn(
        21, 1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def denoise(x, at):
        return torch.tanh(x + at.alpha)

    drawn = walk(make_stepper(kind), fresh[-1], levels, denoise, lambda index: fresh[index])
    x_t = fresh[-1]
    for index, (step, at) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        torch.testing.assert_close(x_t, drawn[index], rtol=0, atol=1e-4)
        arguments = {"eta": 1.0} if kind == "ddpm" else {}
        if make_stepper(kind).needs_noise:
            arguments["variance_noise"] = fresh[index]
        x_t = scheduler.step(denoise(x_t, at), step, x_t, **arguments).prev_sample


# What is refused.


@pytest.mark.parametrize(
    ("kind", "eta", "message"),
    [
        ("euler", None, r"sampler 'euler' is unknown; use one of \('dpmpp_2m', "),
        ("ddim", 1.5, "eta=1.5 must be from 0 to 1"),
        ("ddim", float("nan"), "eta=nan must be from 0 to 1"),
        ("heun", 0.5, "eta=0.5 means something to sampler 'ddim' only, not to 'heun'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_no_solver_can_do_is_named(kind, eta, message):
    with pytest.raises(ValueError, match=message):
        make_stepper(kind, eta)


@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_can_be_made(kind):
    assert make_stepper(kind).evaluations in (1, 2)
