import pytest
import torch

from layered_model.parametrization import target, to_eps, to_x0
from layered_model.schedules import alpha_sigma

KINDS = ("v", "x0", "eps")
each_kind = pytest.mark.parametrize("kind", KINDS)


def example(dtype, logsnr_limit):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 32, 3, 4, 4, generator=generator, dtype=dtype)
    logsnr = torch.linspace(-logsnr_limit, logsnr_limit, 32, dtype=dtype)
    alpha, sigma = (part[:, None, None, None] for part in alpha_sigma(logsnr))
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


@each_kind
@pytest.mark.parametrize(
    ("dtype", "limit", "tolerance"), [(torch.float32, 2.0, 2e-6), (torch.float64, 15.0, 1e-11)]
)
def test_the_target_stands_for_its_picture_and_its_noise(kind, dtype, limit, tolerance):
    x0, eps, x_t, alpha, sigma = example(dtype, limit)
    output = target(kind, x0, eps, alpha, sigma)
    x0_hat = to_x0(kind, output, x_t, alpha, sigma)
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(to_eps(kind, output, x_t, alpha, sigma), eps, rtol=0, atol=tolerance)


@each_kind
def test_any_output_explains_the_noisy_picture(kind):
    *_, x_t, alpha, sigma = example(torch.float64, 5.0)
    output = torch.randn_like(x_t)
    x0_hat = to_x0(kind, output, x_t, alpha, sigma)
    eps_hat = to_eps(kind, output, x_t, alpha, sigma)
    torch.testing.assert_close(alpha * x0_hat + sigma * eps_hat, x_t, rtol=0, atol=1e-12)
    again = target(kind, x0_hat, eps_hat, alpha, sigma)
    torch.testing.assert_close(again, output, rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", KINDS)
@pytest.mark.parametrize("end", KINDS)
def test_every_prediction_turns_into_every_other(start, end):
    x0, eps, x_t, alpha, sigma = example(torch.float64, 5.0)
    output = target(start, x0, eps, alpha, sigma)
    x0_hat = to_x0(start, output, x_t, alpha, sigma)
    eps_hat = to_eps(start, output, x_t, alpha, sigma)
    torch.testing.assert_close(
        target(end, x0_hat, eps_hat, alpha, sigma),
        target(end, x0, eps, alpha, sigma),
        rtol=0,
        atol=1e-10,
    )


def test_v_is_the_noisy_picture_turned_by_a_right_angle():
    x0, eps, x_t, alpha, sigma = example(torch.float64, 15.0)
    v = target("v", x0, eps, alpha, sigma)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + eps**2, rtol=1e-12, atol=1e-12)
