"""A network that knows the exact answer for Gaussian pictures stands in for a trained one.

Pictures whose DCT coefficients are independent, of mean m_f and deviation s_f, have the same form in every layer: the low
frequencies, times 1 / k. The exact denoiser is linear, and the probability flow ODE keeps
(x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) constant in each coefficient. So what a sampler should draw from given noise is
known.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch

from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.noise import white_noise
from layered_model.parametrization import target
from layered_model.resample import _dct_matrix, downscale
from layered_model.sampler import (
    Denoiser,
    Guidance,
    Level,
    Prompt,
    make_stepper,
    sample,
    sampling_times,
)
from layered_model.schedules import alpha_sigma, cosine_logsnr
from layered_model.unet import LayeredUNet

CONFIG = DiffusionConfig(noise="sinc", reference_resolution=16)
SEEDS = (5, 6, 7)


class Gaussian(LayeredUNet):
    """The exact denoiser of Gaussian pictures; counts its calls. Text moves the mean: by ``text[0, 0]`` where there is any."""

    def __init__(self, config, diffusion, coloured=False):
        super().__init__(config)
        self.diffusion = diffusion
        self.coloured = coloured
        self.calls = []

    def moments(self, resolution, shift=0.0):
        """Mean and deviation of each DCT coefficient of the layer of a resolution."""
        frequency = torch.arange(resolution, dtype=torch.float64)
        radius = (frequency[:, None] ** 2 + frequency**2).sqrt()
        spread = 0.5 / (1 + radius) if self.coloured else torch.full_like(radius, 0.15)
        ratio = self.config.resolutions[-1] / resolution
        mean = torch.zeros_like(spread)
        mean[0, 0] = resolution * (0.1 + shift)
        return mean, spread / ratio

    def forward(self, x, logsnr, text, text_mask):
        self.calls.append([picture.clone() for picture in x])
        outputs = []
        for layer, picture in enumerate(x):
            alpha, sigma = alpha_sigma(logsnr.double() + self.diffusion.shifts[layer])
            alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
            mean, spread = self.moments(picture.shape[-1])
            shift = torch.where(text_mask[:, :1], text[:, 0, :1], 0.0)[..., None, None]
            mean = mean + shift * (mean != 0) * picture.shape[-1]
            c = _dct_matrix(picture.shape[-1])
            x_f = c @ picture.double() @ c.T
            gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)
            x0_f = mean + gain * (x_f - alpha * mean)
            x0 = c.T @ x0_f @ c
            eps = (picture - alpha * x0) / sigma
            kind = self.diffusion.config.prediction
            outputs.append(target(kind, x0, eps, alpha, sigma).float())
        return outputs

    def flow(self, eps):
        """Where the probability flow ODE carries a layer's noise."""
        mean, spread = self.moments(eps.shape[-1])
        c = _dct_matrix(eps.shape[-1])
        return c.T @ (mean + spread * (c @ eps.double() @ c.T)) @ c


@pytest.fixture
def gaussian(tiny):
    def make(coloured=False, **changes):
        config = tiny(resolutions=(8, 16), channels=(8, 8), blocks=(1, 1), attention=(0,))
        diffusion = LayeredDiffusion(replace(CONFIG, **changes), config.resolutions)
        return Gaussian(config, diffusion, coloured)

    return make


def seeded(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(network, seeds=SEEDS, guidance=None, text=0.0, num_steps=20, **options):
    prompt = Prompt(torch.full((len(seeds), 1, 12), text), torch.ones(len(seeds), 1) > 0)
    nothing = Prompt(torch.zeros_like(prompt.text), torch.zeros_like(prompt.mask))
    denoiser = Denoiser(network, network.diffusion, prompt, nothing, guidance or Guidance())
    return sample(denoiser, seeded(seeds), num_steps=num_steps, **options)


# What is drawn.


@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
def test_dpmpp_draws_the_gaussian(coloured, prediction, gaussian):
    network = gaussian(coloured, prediction=prediction)
    low, high = draw(network, num_steps=200)
    exact = network.flow(white_noise(seeded(), 3, 16))
    assert (high - exact).abs().max() < 4e-3
    torch.testing.assert_close(low, downscale(high, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("coloured", [False, True])
def test_ddim_draws_the_gaussian(coloured, gaussian):
    network = gaussian(coloured)
    high = draw(network, num_steps=400, sampler="ddim")[-1]
    assert (high - network.flow(white_noise(seeded(), 3, 16))).abs().max() < 1e-2


def test_ancestral_sampling_has_mean_and_variance(gaussian):
    # 24 pictures of 768 values: the variance is known to 1 %, the mean to 0.001; the steps leave 4 % of it out.
    network = gaussian()
    low, high = draw(network, tuple(range(24)), num_steps=400, sampler="ddim", eta=1.0)
    assert high.mean() == pytest.approx(0.1, abs=4e-3)
    assert high.var() == pytest.approx(0.15**2, rel=0.07)
    assert low.var() == pytest.approx((0.15 / 2) ** 2, rel=0.07)


def flow_error(kind, num_steps, spread=0.5):
    """Relative error of a Gaussian's deviation between two times, in float64."""
    times = torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64)
    levels = [level(t) for t in times]
    deviation = [(at.alpha**2 * spread**2 + at.sigma**2).sqrt() for at in levels]
    x_t, stepper = deviation[0], make_stepper(kind)
    for (t, s), total in zip(pairwise(levels), deviation, strict=False):
        x_t = stepper.step(x_t, t.alpha * spread**2 / total**2 * x_t, t, s, None)
    return abs(float(x_t / deviation[-1] - 1))


@pytest.mark.parametrize(("kind", "ratio"), [("dpmpp_2m", 4.0), ("ddim", 2.0)])
def test_halving_the_steps_divides_the_error_by_the_order(kind, ratio):
    errors = [flow_error(kind, num_steps) for num_steps in (40, 80, 160, 320)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(ratio, rel=0.05)
    assert errors[0] < (2e-3 if kind == "dpmpp_2m" else 5e-2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_of_ddim_goes_to_the_gaussians(eta):
    # Exact: a step is linear in its state and its noise, so variances add without drawing anything.
    spread, errors = 0.5, []
    for num_steps in (100, 200, 400):
        variance = torch.ones((), dtype=torch.float64)
        times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        levels = [level(t) for t in times]
        for t, s in pairwise(levels):
            gain = t.alpha * spread**2 / (t.alpha**2 * spread**2 + t.sigma**2)
            stepper = make_stepper("ddim", eta)
            zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
            kept = stepper.step(one, gain * one, t, s, zero)
            fresh = stepper.step(zero, zero, t, s, one)
            variance = kept.square() * variance + fresh.square()
        errors.append(abs(float(variance) / spread**2 - 1))
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] > 1.8
    assert errors[1] / errors[2] > 1.8


# The steps.


def level(t):
    alpha, sigma = alpha_sigma(cosine_logsnr(t.reshape(1, 1, 1, 1), -15, 15))
    return Level(alpha, sigma)


STEPPERS = [("dpmpp_2m", 0.0), ("ddim", 0.0)]


@pytest.mark.parametrize(("kind", "eta"), STEPPERS)
def test_a_known_picture_is_reached_exactly(kind, eta):
    # With the true x0 the path is alpha x0 + sigma eps, whatever the steps.
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    times = torch.tensor([1.0, 0.7, 0.65, 0.3, 0.01, 0.0], dtype=torch.float64)
    stepper = make_stepper(kind, eta)
    t = level(times[0])
    x_t = t.alpha * x0 + t.sigma * eps
    for time in times[1:]:
        s = level(time)
        x_t = stepper.step(x_t, x0, t, s, None)
        torch.testing.assert_close(x_t, s.alpha * x0 + s.sigma * eps, rtol=0, atol=1e-12)
        t = s


def test_the_first_step_of_dpmpp_is_that_of_ddim():
    x_t, x0_hat = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    t, s = level(torch.tensor(0.8).double()), level(torch.tensor(0.5).double())
    steps = [make_stepper(kind).step(x_t, x0_hat, t, s, None) for kind in ("dpmpp_2m", "ddim")]
    torch.testing.assert_close(*steps, rtol=0, atol=1e-12)


def test_a_full_ancestral_step_is_the_posterior():
    # q(x_s | x_t, x0) of a variance-preserving process, Ho et al. 2020, equation 7, in alpha and sigma.
    x_t, x0 = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    t, s = level(torch.tensor(0.8).double()), level(torch.tensor(0.5).double())
    ratio = t.alpha / s.alpha
    variance = t.sigma**2 - ratio**2 * s.sigma**2
    mean = ratio * s.sigma**2 / t.sigma**2 * x_t + s.alpha * variance / t.sigma**2 * x0
    deviation = (variance * s.sigma**2 / t.sigma**2).sqrt()
    stepper = make_stepper("ddim", 1.0)
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    torch.testing.assert_close(stepper.step(x_t, x0, t, s, zero), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        stepper.step(x_t, x0, t, s, one), mean + deviation, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("kind", "tolerance"), [("dpmpp_2m", 1e-4), ("ddim", 2e-2)])
def test_steps_agree_with_a_general_ode_solver(kind, tolerance):
    # A mixture of two narrow Gaussians: the denoiser is not linear. d(x/alpha) / d(sigma/alpha) = (x - alpha x0_hat) / sigma.
    def denoise(x, alpha, sigma):
        variance = alpha**2 * 0.2**2 + sigma**2
        pull = np.tanh(alpha * x * 0.6 / variance)
        return 0.6 * pull + alpha * 0.2**2 / variance * (x - alpha * 0.6 * pull)

    x_t = torch.tensor([-2.0, -0.3, 0.1, 0.4, 1.5], dtype=torch.float64).reshape(5, 1, 1, 1)
    times = torch.linspace(0.95, 0.05, 401, dtype=torch.float64)
    start, end = level(times[0]), level(times[-1])

    def slope(noise, y):
        alpha = (1 + noise**2) ** -0.5
        return (y - denoise(alpha * y, alpha, alpha * noise)) / noise

    span = [float(ends.sigma / ends.alpha) for ends in (start, end)]
    y = (x_t / start.alpha).flatten().numpy()
    exact = scipy.integrate.solve_ivp(slope, span, y, rtol=1e-10, atol=1e-12).y[:, -1]

    stepper, t = make_stepper(kind), start
    for time in times[1:]:
        s = level(time)
        x0_hat = torch.from_numpy(denoise(x_t.numpy(), t.alpha.numpy(), t.sigma.numpy()))
        x_t = stepper.step(x_t, x0_hat, t, s, None)
        t = s
    np.testing.assert_allclose((x_t / end.alpha).flatten(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("kind", "eta"), [*STEPPERS, ("ddim", 0.5), ("ddim", 1.0)])
def test_layers_never_part(kind, eta):
    # Each layer steps by itself, with downscaled estimates and step noise: still one picture.
    diffusion = LayeredDiffusion(CONFIG, (8, 16, 64))
    times = torch.linspace(1, 0, 21, dtype=torch.float64)
    generators = seeded((0,))

    def fresh():
        return diffusion.noise(lambda r: white_noise(generators, 3, r).double())

    states, steppers = fresh(), [make_stepper(kind, eta) for _ in range(3)]
    states = diffusion.inputs_from_top(states[-1], times[:1])
    for t, s in zip(times.split(1), times[1:].split(1), strict=False):
        estimate = diffusion.pyramid(torch.tanh(states[-1]))
        noise = fresh() if eta else [None] * 3
        states = [
            stepper.step(
                state,
                x0_hat,
                Level(*diffusion.alpha_sigma(t, layer)),
                Level(*diffusion.alpha_sigma(s, layer)),
                n,
            )
            for layer, (stepper, state, x0_hat, n) in enumerate(
                zip(steppers, states, estimate, noise, strict=True)
            )
        ]
        for one, other in zip(states, diffusion.inputs_from_top(states[-1], s), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


# The times.


@pytest.mark.parametrize("num_steps", [1, 2, 25, 1000])
@pytest.mark.parametrize(("reference", "extra"), [(8, ()), (64, ()), (512, ()), (64, (1.0,) * 3)])
def test_times_go_from_noise_to_clean_without_a_stop(num_steps, reference, extra):
    config = replace(CONFIG, reference_resolution=reference, extra_logsnr=extra)
    diffusion = LayeredDiffusion(config, (8, 64, 512))
    times = sampling_times(diffusion, num_steps)
    assert len(times) == num_steps + 1
    assert times[-1] == 0
    logsnr = diffusion.logsnr_ref(times[:-1])
    assert logsnr[0] == pytest.approx(-15, abs=1e-3)
    assert (logsnr.diff() > 0).all()
    assert (logsnr < 15).all()


def test_times_are_even_in_the_angle_of_the_squared_tangent():
    diffusion = LayeredDiffusion(CONFIG, (8, 16, 64))
    alpha, sigma = diffusion.alpha_sigma(sampling_times(diffusion, 40).double()[:-1], 2)
    # The top is four times the reference; in the middle between them the noise is half of the top's.
    angle = (sigma / alpha / 2).sqrt().atan().flatten()
    torch.testing.assert_close(angle.diff(), angle.diff().mean().expand(39), rtol=1e-3, atol=0)


def spectrum_error(resolution, reference, times_of, num_steps=25):
    """How far DPM-Solver++ misses the deviations of pictures with amplitudes 1 / (1 + f), as a share of their norm."""
    diffusion = LayeredDiffusion(replace(CONFIG, reference_resolution=reference), (resolution,))
    frequency = torch.arange(resolution, dtype=torch.float64)
    spread = 1 / (1 + (frequency[:, None] ** 2 + frequency**2).sqrt())[None, None]
    spread *= 0.45 * resolution / spread.norm()
    x_t, stepper = torch.ones_like(spread), make_stepper("dpmpp_2m")
    for t, s in pairwise(times_of(diffusion, num_steps).double().split(1)):
        at, to = (Level(*diffusion.alpha_sigma(time, 0)) for time in (t, s))
        x0_hat = at.alpha * spread**2 / (at.alpha**2 * spread**2 + at.sigma**2) * x_t
        x_t = stepper.step(x_t, x0_hat, at, to, None)
    return float((x0_hat - spread).norm() / spread.norm())


def even_times(_diffusion, num_steps):
    return torch.linspace(1, 0, num_steps + 1)


@pytest.mark.parametrize(
    ("resolution", "reference", "bound", "of_even"),
    [(32, 16, 0.03, 0.055), (128, 32, 0.04, 0.15), (512, 64, 0.05, 0.25)],
)
def test_few_steps_keep_the_detail_of_natural_spectra(resolution, reference, bound, of_even):
    assert spectrum_error(resolution, reference, sampling_times) < bound
    assert spectrum_error(resolution, reference, even_times) > of_even


# The loop.


@pytest.mark.parametrize("noise", ["sinc", "box", "independent"])
@pytest.mark.parametrize("options", [{}, {"sampler": "ddim", "eta": 1.0}])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(noise, options, gaussian):
    network = gaussian(noise=noise)
    together = draw(network, (5, 6, 7), **options)
    for row, seed in enumerate((5, 6, 7)):
        alone = draw(network, (seed,), **options)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], other[row], rtol=0, atol=1e-6)
    assert (together[-1][0] - together[-1][1]).abs().max() > 0.1


def test_lower_inputs_come_from_the_top_state(gaussian):
    network = gaussian()
    draw(network, num_steps=5, sampler="ddim", eta=1.0)
    times = sampling_times(network.diffusion, 5)
    assert len(network.calls) == 5
    for t, inputs in zip(times, network.calls, strict=False):
        expected = network.diffusion.inputs_from_top(inputs[-1], t.expand(len(SEEDS)))
        assert all(torch.equal(one, other) for one, other in zip(inputs, expected, strict=True))


def test_early_exit_starts_from_the_same_noise_downscaled(gaussian):
    network = gaussian()
    draw(network, num_steps=1, resolution=8)
    draw(network, num_steps=1)
    part, full = network.calls
    assert len(part) == 1
    torch.testing.assert_close(part[0], full[0], rtol=0, atol=1e-5)


def test_early_exit_draws_the_same_picture_smaller(gaussian):
    network = gaussian(coloured=True)
    (low,) = draw(network, resolution=8)
    torch.testing.assert_close(low, draw(network)[0], rtol=0, atol=1e-4)


def test_an_unknown_resolution_is_named(gaussian):
    with pytest.raises(ValueError, match=r"resolution=32 must be one of \(8, 16\)"):
        draw(gaussian(), resolution=32)


def test_no_steps_are_refused(gaussian):
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        draw(gaussian(), num_steps=0)


def test_independent_noise_gives_every_layer_its_own_state(gaussian):
    network = gaussian(coloured=True, noise="independent")
    drawn = draw(network, num_steps=200)
    generators = seeded()
    for picture, resolution in zip(drawn, (8, 16), strict=True):
        exact = network.flow(white_noise(generators, 3, resolution))
        assert (picture - exact).abs().max() < 4e-3


def test_independent_noise_with_early_exit_draws_the_same_low_picture(gaussian):
    network = gaussian(noise="independent")
    assert torch.equal(draw(network, resolution=8)[0], draw(network)[0])


def test_each_step_reports_its_estimate(gaussian):
    seen = []
    network = gaussian()
    drawn = draw(network, num_steps=4, on_step=lambda index, x0: seen.append((index, x0[-1])))
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], drawn[-1])


def test_only_the_top_estimate_is_clamped(gaussian):
    network = gaussian()
    drawn = draw(network, text=1.5, num_steps=10)
    assert drawn[-1].max() == 1
    states = draw(gaussian(noise="independent"), text=1.5, num_steps=10)
    assert all(state.max() > 1 for state in states)


# Guidance.


def test_guidance_one_runs_once_and_is_the_conditional_model(gaussian):
    network = gaussian()
    one = draw(network, text=0.2, num_steps=6, guidance=Guidance(scale=1.0))
    assert [len(inputs[0]) for inputs in network.calls] == [3] * 6
    assert one[-1].mean() == pytest.approx(0.3, abs=0.02)


def test_guidance_zero_is_the_unconditional_model(gaussian):
    network = gaussian()
    zero = draw(network, text=0.2, num_steps=6, guidance=Guidance(scale=0.0))
    none = draw(network, text=0.0, num_steps=6)
    torch.testing.assert_close(zero[-1], none[-1], rtol=0, atol=1e-5)


def test_guidance_goes_on_from_the_unconditional_through_the_conditional(gaussian):
    # A difference of means alone: guidance w draws with the mean moved w times as far.
    network = gaussian()
    guided = draw(network, text=0.1, guidance=Guidance(scale=3.0))
    assert [len(inputs[0]) for inputs in network.calls] == [6] * 20
    torch.testing.assert_close(guided[-1], draw(network, text=0.3)[-1], rtol=0, atol=1e-5)


def test_outside_the_interval_the_network_runs_once(gaussian):
    network = gaussian()
    interval = (-2.0, 3.0)
    draw(network, num_steps=12, guidance=Guidance(scale=3.0, logsnr_interval=interval))
    logsnr = network.diffusion.logsnr_ref(sampling_times(network.diffusion, 12))[:-1]
    inside = (logsnr >= -2) & (logsnr <= 3)
    assert 0 < inside.sum() < 12
    rows = [len(inputs[0]) for inputs in network.calls]
    assert rows == [6 if both else 3 for both in inside.tolist()]


def test_an_empty_interval_is_no_guidance(gaussian):
    network = gaussian()
    off = draw(network, text=0.1, guidance=Guidance(scale=9.0, logsnr_interval=(90.0, 99.0)))
    assert torch.equal(off[-1], draw(network, text=0.1)[-1])
