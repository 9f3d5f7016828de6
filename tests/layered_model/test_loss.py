import math

import pytest
import torch

from layered_model.loss import MIN_SNR_GAMMA, sigmoid_bias, stratified_times, v_weight
from layered_model.loss import output_weight as general_output_weight
from layered_model.parametrization import target, to_eps, to_x0
from layered_model.schedules import (
    alpha_sigma,
    clipped_outside,
    cosine_logsnr,
    layer_shift,
    relative_slope,
)

WEIGHTINGS = ("flat", "min_snr", "sigmoid")
LOGSNR = torch.linspace(-20, 20, 81, dtype=torch.float64)
SNR = LOGSNR.exp()
SLOPE = (LOGSNR / 2).cosh()
RESOLUTION = 64
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)


def output_weight(weighting, kind, logsnr):
    """With the slope of the plain cosine."""
    slope = (logsnr / 2).cosh()
    return general_output_weight(weighting, kind, logsnr, slope, RESOLUTION)


@each_weighting
def test_a_weighting_means_the_same_for_every_prediction(weighting):
    generator = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, len(LOGSNR), 3, 2, 2, generator=generator, dtype=torch.float64)
    alpha, sigma = (part[:, None, None, None] for part in alpha_sigma(LOGSNR))
    x_t = alpha * x0 + sigma * eps
    x0_hat = to_x0("v", wrong, x_t, alpha, sigma)
    eps_hat = to_eps("v", wrong, x_t, alpha, sigma)
    costs = [
        output_weight(weighting, kind, LOGSNR)
        * (target(kind, x0, eps, alpha, sigma) - target(kind, x0_hat, eps_hat, alpha, sigma))
        .square()
        .mean(dim=(1, 2, 3))
        for kind in ("v", "x0", "eps")
    ]
    torch.testing.assert_close(costs[1], costs[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(costs[2], costs[0], rtol=1e-6, atol=0)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_flat_is_one_on_v():
    close(output_weight("flat", "v", LOGSNR), torch.ones_like(LOGSNR))
    close(output_weight("flat", "x0", LOGSNR), SNR + 1)
    close(output_weight("flat", "eps", LOGSNR), 1 + 1 / SNR)


def test_min_snr_is_the_clipped_snr_on_x0():
    clipped = SNR.clamp(max=MIN_SNR_GAMMA)
    close(output_weight("min_snr", "x0", LOGSNR), clipped)
    close(output_weight("min_snr", "eps", LOGSNR), clipped / SNR)
    close(output_weight("min_snr", "v", LOGSNR), clipped / (SNR + 1))


def test_sigmoid_is_a_sigmoid_on_eps_over_even_logsnr():
    falling = torch.sigmoid(sigmoid_bias(RESOLUTION) - LOGSNR)
    close(output_weight("sigmoid", "eps", LOGSNR), SLOPE * falling)
    close(output_weight("sigmoid", "x0", LOGSNR), SLOPE * SNR * falling)


@pytest.mark.parametrize("bend", [0.0, 2.0])
def test_what_sigmoid_counts_does_not_depend_on_the_schedule(bend):
    # The mean over even times of a weight times any error is the integral over logsnr of sigmoid times that error.
    def error(logsnr):
        return torch.sigmoid(-logsnr).sqrt()

    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    logsnr = cosine_logsnr(t, -30, 30, bend)
    weight = v_weight(
        "sigmoid", logsnr, relative_slope(t, clipped_outside(-30, 30, bend), bend), RESOLUTION
    )
    mean = (weight * error(logsnr)).mean()
    even = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    falling = torch.sigmoid(sigmoid_bias(RESOLUTION) - even) * torch.sigmoid(even)
    integral = torch.trapezoid(falling * error(even), even) / (2 * torch.pi)
    torch.testing.assert_close(mean, integral, rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "x0"])
def test_a_bend_does_not_count_the_clips_more(prediction):
    def mean(bend):
        logsnr = cosine_logsnr(t, -15, 15, bend)
        slope = relative_slope(t, clipped_outside(-15, 15, bend), bend)
        return general_output_weight("sigmoid", prediction, logsnr, slope, 512).mean()

    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    torch.testing.assert_close(mean(2 * math.log(8)), mean(0.0), rtol=0.01, atol=0)


def test_layers_of_one_diffusion_weigh_a_time_alike():
    assert sigmoid_bias(512) == -3
    for resolution in (8, 64, 512):
        logsnr = LOGSNR + layer_shift(resolution, 64)
        close(
            torch.sigmoid(sigmoid_bias(resolution) - logsnr),
            torch.sigmoid(sigmoid_bias(64) - LOGSNR),
        )


@each_weighting
@pytest.mark.parametrize("kind", ["v", "x0", "eps"])
def test_weights_are_positive_and_finite_in_float32(weighting, kind):
    weight = output_weight(weighting, kind, LOGSNR.float())
    assert weight.isfinite().all()
    assert (weight > 0).all()


def times(first, count, total, seed=0):
    return stratified_times(first, count, total, torch.Generator().manual_seed(seed))


def test_one_time_falls_into_each_stratum_of_the_global_batch():
    drawn = torch.cat([times(first, 8, 32) for first in (0, 8, 16, 24)])
    assert sorted((drawn.double() * 32).floor().tolist()) == list(range(32))


@pytest.mark.parametrize("shares", [(32,), (16, 16), (8, 8, 8, 8), (11, 21)])
def test_ranks_share_out_one_global_draw(shares):
    firsts = torch.tensor([0, *shares]).cumsum(0)
    drawn = [times(int(f), count, 32) for f, count in zip(firsts, shares, strict=False)]
    assert torch.equal(torch.cat(drawn), times(0, 32, 32))


def test_a_place_in_the_batch_says_nothing_about_its_time():
    drawn = torch.stack([times(0, 16, 16, seed) for seed in range(400)])
    # The mean of 400 uniform times has a standard deviation of 0.0144.
    assert (drawn.mean(dim=0) - 0.5).abs().max() < 5 * 0.0144
    assert (drawn.diff(dim=1) < 0).any(dim=0).all()


def test_times_lie_in_the_unit_interval():
    drawn = torch.stack([times(0, 16, 16, seed) for seed in range(50)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_pictures_beyond_the_batch_are_named():
    with pytest.raises(ValueError, match="first=30, count=8 must lie within a batch of total=32"):
        times(30, 8, 32)
