import numpy as np
import pytest
import torch
from torch import nn

from layered_model.ema import DecayEMA, PowerEMA, Profile, combine, gamma_of, reconstruction


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


# Averages made afterwards.


def density(profile, num_steps):
    """Share of each of so many steps in a profile."""
    edges = np.minimum(np.arange(num_steps + 1) / profile.time, 1.0)
    return np.diff(edges ** (gamma_of(profile.relative_width) + 1))


def kept(every, last, widths=(0.05, 0.1)):
    """The snapshots that two tracked averages leave."""
    return [Profile(width, time) for time in range(every, last + 1, every) for width in widths]


@pytest.mark.parametrize(
    ("width", "tolerance"),
    [(0.04, 0.02), (0.06, 0.006), (0.08, 0.006), (0.12, 0.006), (0.15, 0.02), (0.25, 0.12)],
)
@pytest.mark.parametrize("at", [8000, 6500])
def test_two_widths_make_every_other(width, tolerance, at):
    # Distance of the profiles, relative to the wanted one, from 16 snapshots of each width.
    snapshots, wanted = kept(500, 8000), Profile(width, at)
    shares = reconstruction(snapshots, wanted)
    made = sum(
        share * density(snapshot, 8000) for share, snapshot in zip(shares, snapshots, strict=True)
    )
    target = density(wanted, 8000)
    assert np.linalg.norm(made - target) < tolerance * np.linalg.norm(target)
    assert sum(shares) == pytest.approx(1, abs=1e-9)


def test_a_tracked_profile_makes_itself():
    snapshots = kept(500, 4000)
    shares = reconstruction(snapshots, Profile(0.1, 4000))
    np.testing.assert_allclose(shares, [0.0] * 15 + [1.0], atol=1e-6)


def test_only_ratios_of_times_matter():
    steps = reconstruction(kept(100, 800), Profile(0.07, 800))
    pictures = reconstruction(kept(25600, 204800), Profile(0.07, 204800))
    np.testing.assert_allclose(steps, pictures, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("width", "tolerance"), [(0.07, 2e-3), (0.15, 5e-3)])
def test_a_reconstruction_equals_the_average_tracked_directly(width, tolerance):
    # Weights wander as under training; the tolerance is relative to how far the two tracked averages lie apart.
    module, num_steps = Weights(), 800
    tracked = {w: PowerEMA(module, w) for w in (0.05, 0.1, width)}
    generator = torch.Generator().manual_seed(0)
    profiles, snapshots = [], []
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            for value in (module.a, module.b):
                value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
            module.count.fill_(step)
        for average in tracked.values():
            average.update(module)
        if step % 50 == 0:
            for w in (0.05, 0.1):
                profiles.append(Profile(w, step))
                snapshots.append({k: v.clone() for k, v in tracked[w].weights.items()})
    made = combine(reconstruction(profiles, Profile(width, num_steps)), iter(snapshots))
    for name in ("a", "b"):
        apart = (tracked[0.05].weights[name] - tracked[0.1].weights[name]).abs().max()
        assert (made[name] - tracked[width].weights[name]).abs().max() < tolerance * apart
    assert made["count"] == num_steps


def test_halves_are_summed_in_float32():
    weights = [{"a": torch.full((2,), value, dtype=torch.float16)} for value in (1.0, 3.0)]
    made = combine([0.25, 0.75], weights)
    assert made["a"].dtype == torch.float32
    assert made["a"].tolist() == [2.5, 2.5]


@pytest.mark.parametrize(
    ("snapshots", "wanted", "message"),
    [
        ([], Profile(0.1, 10), "snapshots=.* at least one"),
        (kept(5, 5) * 2, Profile(0.1, 5), "must be distinct"),
        (kept(5, 10), Profile(0.1, 11), "time 11 must not lie beyond the last snapshot's, 10"),
        (kept(5, 10), Profile(0.5, 10), "relative width 0.5 must lie in"),
        (kept(5, 10), Profile(0.1, 0), "time 0 of a profile must be positive"),
        (kept(5, 10), Profile(0.1, float("nan")), "time nan of a profile must be positive"),
    ],
)
def test_impossible_reconstructions_are_named(snapshots, wanted, message):
    with pytest.raises(ValueError, match=message):
        reconstruction(snapshots, wanted)


# The plain average.


def test_a_plain_average_decays():
    module, decay = Weights(), 0.6
    ema = DecayEMA(module, decay)
    expected = None
    for step, weights in enumerate(trajectory(module, 60), start=1):
        ema.update(module)
        beta = min(decay, (step - 1) / (step + 9))
        a = weights["a"]
        expected = a if expected is None else beta * expected + (1 - beta) * a
    torch.testing.assert_close(ema.weights["a"], expected, rtol=0, atol=1e-13)
    assert ema.beta(10_000) == decay


def test_its_warm_up_forgets_the_initial_weights():
    module = Weights()
    ema = DecayEMA(module, 0.9999)
    next(iter(trajectory(module, 1)))
    ema.update(module)
    assert torch.equal(ema.weights["a"], module.a)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decays_are_named(decay):
    with pytest.raises(ValueError, match=f"decay={decay} must lie in"):
        DecayEMA(Weights(), decay)


# Another network's weights.


def test_another_networks_weights_are_refused():
    ema = PowerEMA(Weights())
    with pytest.raises(ValueError, match="are in one of the two only: another network's"):
        ema.update(nn.Linear(2, 2))
    wrong = {**ema.weights, "a": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"weight 'a' has shape \(4,\), the average's has \(3,\)"):
        ema.load_state_dict(1, wrong)
    with pytest.raises(ValueError, match="num_updates=-1 must not be negative"):
        ema.load_state_dict(-1, ema.weights)
    assert ema.num_updates == 0
