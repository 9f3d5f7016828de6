"""The Frechet distance between Gaussians that are known: its standard error and its limit for ever more pictures."""

import functools
import math

import numpy as np
import pytest

from pipelines.estimates import Estimate
from pipelines.frechet import frechet_estimate, frechet_infinity, frechet_influence
from pipelines.metrics import FeatureStatistics, frechet_distance

DIM = 24
_ROOT = np.random.default_rng(0).normal(size=(DIM, DIM)) / np.sqrt(DIM)
_SHIFT = np.linspace(-0.2, 0.2, DIM)


def _gaussian(root: np.ndarray, mean: np.ndarray) -> FeatureStatistics:
    """Statistics whose covariance is root^T root."""
    return FeatureStatistics(count=2, mean=mean, factor=root)


REFERENCE = _gaussian(1.2 * _ROOT, _SHIFT)
TRUTH = frechet_distance(_gaussian(_ROOT, np.zeros(DIM)), REFERENCE)


def _draw(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng((n, seed)).normal(size=(n, DIM)) @ _ROOT


@functools.cache
def _draws(n: int) -> np.ndarray:
    return np.array([frechet_estimate(_draw(n, seed), REFERENCE) for seed in range(200)])


def test_the_known_distance_is_the_closed_form() -> None:
    """Covariances that are multiples: |shift|^2 + (1.2 - 1)^2 tr C."""
    expected = _SHIFT @ _SHIFT + 0.2**2 * np.square(_ROOT).sum()
    assert pytest.approx(expected, rel=1e-10) == TRUTH


@pytest.mark.parametrize("n", [16, 64, 512])
def test_the_standard_error_is_the_deviation_over_draws(n: int) -> None:
    """With fewer pictures than features, too."""
    values, errors = _draws(n).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.2)
    held = np.abs(values - values.mean()) < 1.96 * errors
    assert 0.88 <= held.mean() <= 0.99


def test_percentiles_over_resampled_pictures_would_not_hold_the_value_itself() -> None:
    """Why the intervals are not those of the usual bootstrap."""
    x, rng = _draw(48, 0), np.random.default_rng(0)
    again = [frechet_estimate(x[rng.integers(48, size=48)], REFERENCE).value for _ in range(100)]
    assert np.percentile(again, 2.5) > frechet_estimate(x, REFERENCE).value


def test_the_influence_is_the_derivative_by_a_pictures_weight() -> None:
    """Against what one more of a picture makes of a set that has each a hundred times."""
    x = np.repeat(_draw(100, 1), 100, axis=0)
    own = FeatureStatistics.from_features(x)
    rows = x[::500]
    changed = [FeatureStatistics.from_features(np.vstack([x, row])) for row in rows]
    slopes = np.array([frechet_distance(other, REFERENCE) for other in changed]) * len(x)
    found = frechet_influence(rows, own, REFERENCE)
    assert slopes - slopes.mean() == pytest.approx(found - found.mean(), rel=0.02, abs=0.02)


@pytest.mark.parametrize("n", [4 * DIM, 32 * DIM])
def test_the_limit_is_the_truth_where_the_distance_is_biased(n: int) -> None:
    limits = np.array(
        [
            frechet_infinity(_draw(n, seed), REFERENCE, Estimate(*_draws(n)[seed]), seed=seed)
            for seed in range(60)
        ]
    )
    bias = _draws(n)[:, 0].mean() - TRUTH
    assert bias > 0
    assert abs(limits[:, 0].mean() - TRUTH) < 0.2 * bias + 3 * limits[:, 0].std() / math.sqrt(60)
    held = np.abs(limits[:, 0] - TRUTH) < 1.96 * limits[:, 1]
    assert held.mean() >= 0.85


def test_subsets_depend_on_seed_and_size_alone() -> None:
    x = _draw(100, 0)
    at_all = frechet_estimate(x, REFERENCE)
    first = frechet_infinity(x, REFERENCE, at_all, seed=3)
    np.random.seed(0)  # nothing global matters
    assert frechet_infinity(x, REFERENCE, at_all, seed=3) == first
    assert frechet_infinity(x, REFERENCE, at_all, seed=4) != first


def test_the_limit_of_few_pictures_has_no_interval() -> None:
    x = _draw(4 * DIM - 1, 0)
    assert math.isnan(frechet_infinity(x, REFERENCE, frechet_estimate(x, REFERENCE))[1])


def test_a_line_needs_two_points() -> None:
    x = _draw(20, 0)
    with pytest.raises(ValueError, match="first=19 must be from 2 to 18"):
        frechet_infinity(x, REFERENCE, frechet_estimate(x, REFERENCE), first=19)


def test_features_that_are_always_zero_change_nothing() -> None:
    x = _draw(60, 2)
    wide = np.hstack([x, np.zeros((60, 3))])
    mean = np.append(REFERENCE.mean, np.zeros(3))
    reference = _gaussian(np.hstack([REFERENCE.factor, np.zeros((DIM, 3))]), mean)
    assert frechet_estimate(wide, reference) == pytest.approx(frechet_estimate(x, REFERENCE))
