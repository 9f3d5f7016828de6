import math

import pytest
import torch

from layered_model.schedules import (
    alpha_sigma,
    clipped_outside,
    cosine_logsnr,
    layer_shift,
    relative_slope,
    time_of,
)

DENSE = torch.linspace(0, 1, 20001, dtype=torch.float64)


def test_alpha_sigma_preserve_variance():
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        alpha, sigma = alpha_sigma(torch.linspace(-30, 30, 1001, dtype=dtype))
        assert ((alpha**2 + sigma**2) - 1).abs().max() <= tolerance


def test_alpha_sigma_have_the_logsnr_that_was_asked_for():
    logsnr = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(logsnr)
    torch.testing.assert_close(2 * (alpha / sigma).log(), logsnr, rtol=0, atol=1e-12)


def test_the_reference_is_a_cosine():
    t = DENSE[100:-100]
    alpha, sigma = alpha_sigma(cosine_logsnr(t, -15, 15))
    torch.testing.assert_close(alpha, torch.cos(math.pi / 2 * t), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, torch.sin(math.pi / 2 * t), rtol=0, atol=1e-12)


def test_time_of_is_the_inverse_of_the_reference():
    t = DENSE[100:-100]
    torch.testing.assert_close(time_of(cosine_logsnr(t, -15, 15)), t, rtol=0, atol=1e-12)


def test_logsnr_falls_with_time():
    step = cosine_logsnr(DENSE, -15, 15).diff()
    assert (step <= 0).all()
    assert (step[10:-10] < 0).all()


def test_the_reference_is_odd_about_the_middle():
    logsnr = cosine_logsnr(DENSE, -15, 15)
    torch.testing.assert_close(logsnr, -logsnr.flip(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), [(-15.0, 15.0), (-5.0, 20.0), (-20.0, 3.0)])
def test_both_ends_are_the_clips(low, high):
    ends = cosine_logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64), low, high)
    torch.testing.assert_close(
        ends, torch.tensor([low, high], dtype=torch.float64), rtol=0, atol=1e-7
    )
    inside = cosine_logsnr(DENSE, low, high)
    assert inside.min() >= low - 1e-7
    assert inside.max() <= high + 1e-7


def test_both_ends_are_finite_in_float32():
    for limit in (15.0, 20.0, 25.0):
        ends = cosine_logsnr(torch.tensor([0.0, 1.0]), -limit, limit)
        assert ends.isfinite().all()
        assert all(part.isfinite().all() and (part > 0).all() for part in alpha_sigma(ends))


def test_shift_is_twice_the_log_of_the_ratio():
    assert layer_shift(64, 64) == 0
    assert layer_shift(256, 64) == pytest.approx(-2 * math.log(4))
    assert layer_shift(16, 64) == pytest.approx(2 * math.log(4))


def test_shifts_add_up_along_the_ladder():
    assert layer_shift(512, 64) == pytest.approx(layer_shift(512, 128) + layer_shift(128, 64))


def test_the_shift_is_what_averaging_pixels_does_to_the_noise():
    # k x k averages divide the noise variance by k^2 and leave a flat picture as it is.
    ratio = 4
    snr_high = math.exp(layer_shift(256, 64))
    snr_low = math.exp(layer_shift(256 // ratio, 64))
    assert snr_low == pytest.approx(ratio**2 * snr_high)


BEND = 2 * math.log(256 / 32)


def test_the_interpolated_schedule_is_simple_diffusions():
    # Their equation 6 for pictures of 512 pixels: t logsnr_shift32 + (1 - t) logsnr_shift256.
    t = DENSE[100:-100]
    plain = cosine_logsnr(t, -30, 30)
    theirs = t * (plain + layer_shift(512, 32)) + (1 - t) * (plain + layer_shift(512, 256))
    ours = cosine_logsnr(t, -30, 30, BEND) + layer_shift(512, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bend", [0.0, 0.5, BEND])
def test_a_bent_reference_falls_between_its_clips(bend):
    for dtype in (torch.float32, torch.float64):
        logsnr = cosine_logsnr(DENSE.to(dtype), -15, 15, bend)
        assert logsnr.isfinite().all()
        assert (logsnr.diff() <= 0).all()
        assert logsnr[0] == pytest.approx(15, abs=1e-3)
        assert logsnr[-1] == pytest.approx(-15, abs=1e-3)


@pytest.mark.parametrize("bend", [0.5, BEND])
def test_time_of_is_the_inverse_of_a_bent_reference(bend):
    t = DENSE[100:-100]
    torch.testing.assert_close(
        time_of(cosine_logsnr(t, -30, 30, bend), bend), t, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("bend", [0.0, 0.5, BEND])
def test_relative_slope_is_the_derivative(bend):
    t = DENSE[100:-100].clone().requires_grad_()
    (slope,) = torch.autograd.grad(cosine_logsnr(t, -30, 30, bend).sum(), t)
    torch.testing.assert_close(
        relative_slope(t.detach(), clipped_outside(-30, 30, bend), bend),
        -slope / (2 * math.pi),
        rtol=1e-9,
        atol=0,
    )


def test_the_slope_is_finite_at_both_ends():
    ends = relative_slope(torch.tensor([0.0, 1.0]), clipped_outside(-15, 15))
    torch.testing.assert_close(ends, torch.full((2,), math.cosh(7.5)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bend", [0.0, 0.5, BEND])
def test_outside_of_the_clips_logsnr_stands_still(bend):
    early, late = clipped_outside(-15, 15, bend)
    assert cosine_logsnr(DENSE[early > DENSE], -15, 15, bend).unique().numel() == 1
    assert cosine_logsnr(DENSE[late < DENSE], -15, 15, bend).unique().numel() == 1
    inside = cosine_logsnr(torch.linspace(early, late, 1001, dtype=torch.float64), -15, 15, bend)
    assert (inside.diff() < 0).all()


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([0.5, float("nan")]), "t holds nan, but times lie in"),
        (torch.tensor([0.5, 1.5]), "t holds 1.5, but times lie in"),
        (torch.tensor([-0.25]), "t holds -0.25, but times lie in"),
        (torch.tensor([1]), "t has dtype torch.int64"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_time_is_named(t, message):
    with pytest.raises(ValueError, match=message):
        cosine_logsnr(t, -15.0, 15.0)


def test_impossible_shifts_are_named():
    with pytest.raises(ValueError, match="resolution=0 must be positive"):
        layer_shift(0, 64)
    with pytest.raises(ValueError, match=r"bend=-1\.0 must be finite and not negative"):
        cosine_logsnr(torch.tensor([0.5]), -15, 15, -1.0)
