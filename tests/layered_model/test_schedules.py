import math

import pytest
import torch

from layered_model.schedules import alpha_sigma, cosine_logsnr, layer_shift, time_of

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
