"""The loop, on a network that knows the exact answer for Gaussian pictures (see `conftest.Gaussian`)."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch

from layered_model.denoiser import Denoiser, Guidance
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.noise import white_noise
from layered_model.resample import _dct_matrix, downscale, upscale
from layered_model.sampler import Drawing, Plan, Trajectory, sample_steps, sampling_times
from layered_model.steppers import Level, SamplerKind, make_stepper
from layered_model.unet import LayeredUNet

CONFIG = DiffusionConfig(noise="sinc", reference_resolution=16)
KINDS = get_args(SamplerKind)
FLOW = ["dpmpp_2m", "ddim", "heun"]
PREDICTIONS = ["v", "x0", "eps"]

many_steps = pytest.mark.usefixtures("unchecked")
"""Checking every call of thousands of steps would take twice as long again as the steps."""


# What is drawn.


@many_steps
@pytest.mark.parametrize("coloured", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("kind", "num_steps", "tolerance"),
    [("dpmpp_2m", 200, 4e-3), ("heun", 100, 4e-3), ("ddim", 400, 1e-2)],
)
def test_the_flow_draws_the_gaussian(
    kind, num_steps, tolerance, prediction, coloured, gaussian, draw, seeded
):
    network = gaussian(coloured, prediction=prediction)
    low, high = draw(network, num_steps=num_steps, sampler=kind)
    exact = network.flow(white_noise(seeded(), 3, 16))
    assert (high - exact).abs().max() < tolerance
    torch.testing.assert_close(low, downscale(high, 8), rtol=0, atol=1e-6)


@many_steps
@pytest.mark.parametrize(
    ("kind", "prediction"),
    [*((kind, "v") for kind in KINDS), ("dpmpp_2m", "x0"), ("dpmpp_2m", "eps")],
)
def test_what_is_drawn_has_mean_and_covariance_of_the_gaussian(kind, prediction, gaussian, draw):
    # 48 x 3 pictures of 256 values. Whitened, their variance is known to 0.7 %, mean and correlation over all of them to 0.005,
    # and to 0.08 for one coefficient; the steps leave up to 5 % of the variance out.
    network = gaussian(coloured=True, prediction=prediction)
    num_steps = 400 if kind in ("ddim", "ddpm") else 150  # of first order
    drawn = draw(network, tuple(range(48)), num_steps=num_steps, sampler=kind)
    for picture in drawn:
        mean, spread = network.moments(picture.shape[-1])
        c = _dct_matrix(picture.shape[-1])
        white = ((c @ picture.double() @ c.T - mean) / spread).flatten(0, 1)
        assert white.mean().abs() < 0.025
        assert white.var() == pytest.approx(1, abs=0.07)
        assert white.mean(dim=0).abs().max() < 0.4
        for one, other in ((white[:, 1:], white[:, :-1]), (white[..., 1:], white[..., :-1])):
            assert (one * other).mean().abs() < 0.04


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


# The times.


@pytest.mark.parametrize("num_steps", [1, 2, 25, 250])
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


# Layers.


@pytest.mark.parametrize("kind", KINDS)
def test_solvers_commute_with_the_downscale(kind, seeded):
    # The lower layer steps by itself, with downscaled estimates: still one picture.
    diffusion = LayeredDiffusion(CONFIG, (8, 16, 64))
    high, low = (
        Trajectory(
            diffusion,
            Plan(num_steps=20, sampler=kind, resolution=resolution),
            seeded((0,)),
            3,
            torch.device("cpu"),
        )
        for resolution in (64, 16)
    )
    assert len(high) == len(low)
    while not high.done:
        expected = diffusion.inputs_from_top(high.states[0], high.levels)[1]
        torch.testing.assert_close(low.states[0], expected, rtol=0, atol=1e-5)
        estimate = torch.tanh(high.states[0])
        high.advance([estimate])
        low.advance([downscale(estimate, 16)])
    assert low.done


def test_lower_inputs_come_from_the_top_state(gaussian, draw):
    network = gaussian()
    draw(network, (5, 6), num_steps=5, sampler="ddpm")
    times = sampling_times(network.diffusion, 5)
    assert len(network.calls) == 5
    for t, inputs in zip(times, network.calls, strict=False):
        expected = network.diffusion.inputs_from_top(
            inputs[-1], network.diffusion.levels(t.expand(2))
        )
        assert all(torch.equal(one, other) for one, other in zip(inputs, expected, strict=True))


def test_early_exit_starts_from_the_same_noise_downscaled(gaussian, draw):
    network = gaussian()
    draw(network, num_steps=1, resolution=8)
    draw(network, num_steps=1)
    part, full = network.calls
    assert len(part) == 1
    torch.testing.assert_close(part[0], full[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_early_exit_draws_the_same_picture_smaller(kind, gaussian, draw):
    network = gaussian(coloured=True)
    (low,) = draw(network, resolution=8, sampler=kind)
    torch.testing.assert_close(low, draw(network, sampler=kind)[0], rtol=0, atol=1e-4)


@many_steps
def test_independent_noise_gives_every_layer_its_own_state(gaussian, draw, seeded):
    network = gaussian(coloured=True, noise="independent")
    drawn = draw(network, num_steps=200)
    generators = seeded()
    for picture, resolution in zip(drawn, (8, 16), strict=True):
        exact = network.flow(white_noise(generators, 3, resolution))
        assert (picture - exact).abs().max() < 4e-3


def test_independent_noise_with_early_exit_draws_the_same_low_picture(gaussian, draw):
    network = gaussian(noise="independent")
    assert torch.equal(draw(network, resolution=8)[0], draw(network)[0])


# Batches and steps.


class OneByOne(LayeredUNet):
    """A nonlinear network that computes each picture by itself, so that its batch cannot show in a bit."""

    def forward(self, x, logsnr, text, text_mask):
        return [torch.stack([torch.sin(3 * each) for each in pictures]) for pictures in x]


@pytest.mark.parametrize("noise", ["sinc", "periodic", "box", "independent"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(noise, kind, gaussian, draw):
    network = OneByOne(gaussian().config)
    network.diffusion = gaussian(noise=noise).diffusion
    together = draw(network, (5, 6, 7), sampler=kind, num_steps=6)
    for row, seed in enumerate((5, 6, 7)):
        alone = draw(network, (seed,), sampler=kind, num_steps=6)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one[0], other[row])
    assert (together[-1][0] - together[-1][1]).abs().max() > 0.1


def test_pictures_at_different_steps_share_a_batch(gaussian, draw, prompts, seeded):
    network = gaussian()
    plan = Plan(num_steps=6)
    first, second = (
        Trajectory(network.diffusion, plan, seeded(seeds), 3, torch.device("cpu"))
        for seeds in ((5,), (6, 7))
    )
    drawn = {}

    def evaluate(*those):
        rows = sum(len(each.t) for each in those)
        denoiser = Denoiser(network, network.diffusion, *prompts(rows), Guidance())
        x0 = denoiser(
            [torch.cat([each.states[0] for each in those])], torch.cat([e.t for e in those])
        )
        for each, part in zip(those, x0[0].split([len(e.t) for e in those]), strict=True):
            each.advance([part])
            drawn[each] = part

    for _ in range(2):
        evaluate(first)
    while not first.done:
        evaluate(first, second)
    while not second.done:
        evaluate(second)
    together = torch.cat([drawn[first], drawn[second]])
    torch.testing.assert_close(together, draw(network, num_steps=6)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [("dpmpp_2m", 4), ("ddpm", 4), ("heun", 7)])
def test_each_evaluation_reports_its_estimate(kind, count, gaussian, draw):
    seen, network = [], gaussian()
    drawn = draw(network, num_steps=4, sampler=kind, on_step=seen.append)
    assert [step.index for step in seen] == list(range(count))
    assert {step.num_evaluations for step in seen} == {count} == {len(network.calls)}
    assert torch.equal(seen[-1].x0[-1], drawn[-1])


def test_who_has_seen_enough_stops_asking(gaussian, prompts, seeded):
    network = gaussian()
    denoiser = Denoiser(network, network.diffusion, *prompts(), Guidance())
    for step in sample_steps(Drawing(denoiser, seeded(), Plan(num_steps=9))):
        if step.index == 2:
            break
    assert len(network.calls) == 3


# From a picture.


def flow_from(network, seeded, x0, times, resolution=16):
    """Where noise on a clean picture at the first of the times goes."""
    alpha, sigma = network.diffusion.alpha_sigma(times[:1].double(), -1)
    return network.flow(alpha * x0 + sigma * white_noise(seeded(), 3, resolution), alpha, sigma)


@many_steps
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("kind", FLOW)
def test_a_start_goes_on_from_its_noised_picture(kind, strength, gaussian, draw, seeded):
    network, x0 = gaussian(), torch.rand(3, 3, 16, 16) - 0.5
    drawn = draw(network, num_steps=400, sampler=kind, start=x0, strength=strength)[-1]
    num_steps = round(400 * strength) * (2 if kind == "heun" else 1) - (kind == "heun")
    assert len(network.calls) == num_steps
    times = sampling_times(network.diffusion, 400)[-round(400 * strength) - 1 :]
    assert (drawn - flow_from(network, seeded, x0, times)).abs().max() < 1e-2


def test_strength_leads_from_the_picture_to_noise_alone(gaussian, draw):
    network, x0 = gaussian(), torch.rand(3, 3, 16, 16) - 0.5
    kept, *_, new = (
        draw(network, num_steps=50, start=x0, strength=strength)[-1] for strength in (0.02, 0.5, 1)
    )
    assert (kept - x0).abs().max() < 0.02
    assert (new - draw(network, num_steps=50)[-1]).abs().max() < 0.01


def test_a_start_with_independent_noise_is_noised_in_every_layer(gaussian, draw, seeded):
    network = gaussian(noise="independent")
    x0 = torch.rand(2, 3, 16, 16) - 0.5
    draw(network, (5, 6), start=x0, num_steps=10, strength=0.5)
    t, generators = sampling_times(network.diffusion, 10)[5:6], seeded((5, 6))
    for layer, x_t in enumerate(network.calls[0]):
        alpha, sigma = network.diffusion.alpha_sigma(t, layer)
        clean = downscale(x0, x_t.shape[-1])
        expected = alpha * clean + sigma * white_noise(generators, 3, x_t.shape[-1])
        torch.testing.assert_close(x_t, expected, rtol=0, atol=1e-6)


# From the lowest layer to all.


def high_band(x, low=8):
    return x - upscale(downscale(x, low), x.shape[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_hand_over_all_layers_run_on_one_picture(kind, gaussian, draw):
    network = gaussian()
    draw(network, num_steps=12, sampler=kind, hand_over=-2.0)
    logsnr = network.diffusion.logsnr_ref(sampling_times(network.diffusion, 12)[:-1])
    alone = int((logsnr < -2).sum())
    per_step = make_stepper(kind).evaluations
    layers = [len(inputs) for inputs in network.calls]
    assert 2 < alone < 10
    assert layers == [1] * (per_step * alone) + [2] * (len(layers) - per_step * alone)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("ddim", 1e-4), ("heun", 1e-4), ("ddpm", 1e-4), ("dpmpp_2m", 5e-3)]
)
def test_a_hand_over_leaves_the_low_picture_as_it_is(kind, tolerance, gaussian, draw):
    # A solver with a memory begins it anew, which costs it one step of first order.
    network = gaussian()
    plain, handed = (draw(network, sampler=kind, hand_over=at)[0] for at in (None, -2.0))
    torch.testing.assert_close(handed, plain, rtol=0, atol=tolerance)


@many_steps
@pytest.mark.parametrize("kind", FLOW)
def test_after_a_hand_over_the_high_band_flows_from_its_noise(kind, gaussian, draw, seeded):
    network = gaussian()
    drawn = draw(network, num_steps=300, sampler=kind, hand_over=-2.0)[-1]
    times = sampling_times(network.diffusion, 300)
    at = times[int((network.diffusion.logsnr_ref(times) < -2).sum())]
    exact = flow_from(network, seeded, torch.zeros(3, 3, 16, 16), at[None])
    assert (high_band(drawn - exact)).abs().max() < 1e-2


@many_steps
def test_a_hand_over_keeps_the_high_band_of_the_start(gaussian, draw, seeded):
    network, x0 = gaussian(), torch.rand(3, 3, 16, 16) - 0.5
    options = {"num_steps": 300, "start": x0, "strength": 0.8}
    drawn = draw(network, **options, hand_over=-1.0)[-1]
    times = sampling_times(network.diffusion, 300)
    at = times[int((network.diffusion.logsnr_ref(times) < -1).sum())]
    exact = flow_from(network, seeded, x0, at[None])
    assert (
        high_band(exact - flow_from(network, seeded, torch.zeros_like(x0), at[None])).std() > 0.01
    )
    assert high_band(drawn - exact).abs().max() < 1e-2


def test_the_earlier_the_hand_over_the_closer_to_the_whole_network(gaussian, draw):
    network = gaussian()
    plain = draw(network, num_steps=60)[-1]
    errors = [
        (high_band(draw(network, num_steps=60, hand_over=at)[-1] - plain)).std()
        for at in (0.0, -3.0, -6.0)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-3
    never = draw(network, num_steps=60, hand_over=-99.0)[-1]
    assert torch.equal(never, plain)


def test_the_last_step_is_the_whole_networks(gaussian, draw):
    network = gaussian()
    assert len(draw(network, num_steps=3, hand_over=99.0)) == 2
    assert [len(inputs) for inputs in network.calls] == [1, 1, 2]


# To a picture that is known when small.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"hand_over": -2.0}])
def test_finishing_keeps_the_low_picture_and_draws_the_rest(kind, options, gaussian, draw):
    network, given = gaussian(), 0.4 * torch.rand(3, 3, 8, 8) - 0.2
    low, high = draw(network, sampler=kind, denoise={"low": given}, **options)
    torch.testing.assert_close(low, given, rtol=0, atol=1e-5)
    free = draw(network, sampler=kind, **options)[-1]
    torch.testing.assert_close(high_band(high), high_band(free), rtol=0, atol=1e-4)


def test_a_preview_that_is_finished_is_the_picture_itself(gaussian, draw):
    network = gaussian()
    full = draw(network, sampler="ddim")[-1]
    (preview,) = draw(network, sampler="ddim", resolution=8)
    finished = draw(network, sampler="ddim", denoise={"low": preview})[-1]
    torch.testing.assert_close(finished, full, rtol=0, atol=1e-4)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 32}, r"resolution=32 must be one of \(8, 16\)"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"strength": 0.0}, "strength=0.0 must be above 0, up to 1"),
        ({"strength": float("nan")}, "strength=nan must be above 0"),
        ({"hand_over": float("nan")}, "hand_over=nan must be a logsnr"),
        ({"eta": 0.5}, "eta=0.5 means something to sampler 'ddim' only"),
        ({"sampler": "ddim", "eta": -1.0}, "eta=-1.0 must be from 0 to 1"),
        (
            {"start": torch.zeros(3, 3, 8, 8)},
            r"start has shape \(3, 3, 8, 8\), .* \(3, 3, 16, 16\)",
        ),
        ({"start": torch.zeros(2, 3, 16, 16)}, r"start has shape \(2, "),
    ],
)
def test_what_cannot_be_drawn_is_named(options, message, gaussian, draw):
    with pytest.raises(ValueError, match=message):
        draw(gaussian(), **options)


def test_a_hand_over_needs_shared_noise(gaussian, draw):
    with pytest.raises(ValueError, match=r"hand_over=-2\.0 needs shared noise"):
        draw(gaussian(noise="independent"), hand_over=-2.0)


def test_generators_must_be_as_many_as_prompts(gaussian, prompts, seeded):
    network = gaussian()
    denoiser = Denoiser(network, network.diffusion, *prompts(2), Guidance())
    with pytest.raises(ValueError, match="3 generators must be as many as prompts: 2"):
        Drawing(denoiser, seeded(), Plan(num_steps=1))
