import pytest
import torch
from torch import nn

from layered_model.ema import PowerEMA, gamma_of


class Weights(nn.Module):
    """Two parameters of different shapes, a float buffer and a counter."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def trajectory(module, num_steps, start=1):
    """Moves a module through weights that depend on the step alone."""
    for step in range(start, num_steps + 1):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for value in (module.a, module.b, module.mean):
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
            module.count.fill_(step)
        yield {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_gamma_is_the_inverse_of_the_width(width):
    gamma = gamma_of(width)
    assert gamma >= 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2, rel=1e-10)


def test_gamma_agrees_with_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_the_width_is_the_standard_deviation_of_the_profile():
    time = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    profile = time ** gamma_of(0.1)
    profile /= profile.sum()
    mean = (profile * time).sum()
    assert (profile * (time - mean) ** 2).sum().sqrt() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, 1.0])
def test_impossible_widths_are_named(width):
    with pytest.raises(ValueError, match=f"relative width {width} must lie in"):
        gamma_of(width)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_average_has_the_power_profile(width):
    # Weights of step i in closed form: the integral of the profile over ((i - 1) / t, i / t].
    module, num_steps = Weights(), 40
    ema = PowerEMA(module, width)
    seen = []
    for weights in trajectory(module, num_steps):
        ema.update(module)
        seen.append(weights)
    edges = (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps) ** (gamma_of(width) + 1)
    share = edges.diff()
    assert share.sum() == pytest.approx(1)
    for name in ("a", "b", "mean"):
        expected = sum(s * weights[name] for s, weights in zip(share, seen, strict=True))
        torch.testing.assert_close(ema.weights[name], expected, rtol=0, atol=1e-13)


def test_the_first_update_forgets_the_initial_weights():
    module = Weights()
    ema = PowerEMA(module)
    next(iter(trajectory(module, 1)))
    ema.update(module)
    assert torch.equal(ema.weights["a"], module.a)


def test_integers_are_taken_as_they_are():
    module = Weights()
    ema = PowerEMA(module)
    for _ in trajectory(module, 5):
        ema.update(module)
    assert ema.weights["count"] == 5


def test_the_average_is_a_copy():
    module = Weights()
    ema = PowerEMA(module)
    with torch.no_grad():
        module.a.fill_(7)
    assert (ema.weights["a"] == 0).all()
    assert not ema.weights["a"].requires_grad


def test_going_on_from_a_state_equals_never_having_stopped():
    module = Weights()
    whole = PowerEMA(module)
    for _ in trajectory(module, 20):
        whole.update(module)

    module = Weights()
    first = PowerEMA(module)
    for _ in trajectory(module, 11):
        first.update(module)
    second = PowerEMA(Weights())
    second.load_state_dict(**first.state_dict())
    for _ in trajectory(module, 20, start=12):
        second.update(module)
    assert second.num_updates == 20
    assert all(torch.equal(second.weights[name], whole.weights[name]) for name in whole.weights)
