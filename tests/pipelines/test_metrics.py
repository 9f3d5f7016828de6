"""Laws of the Frechet distance, the Inception-style score and their mergeable statistics."""

import functools
import itertools

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.metrics import (
    ClassStatistics,
    FeatureStatistics,
    Statistics,
    frechet_distance,
    inception_score,
    pack,
    unpack,
)


def _features(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + rng.normal(size=d)


def _sqrtm_form(x: np.ndarray, y: np.ndarray) -> float:
    ca, cb, delta = np.cov(x.T), np.cov(y.T), x.mean(0) - y.mean(0)
    return float(delta @ delta + np.trace(ca + cb) - 2 * np.trace(scipy.linalg.sqrtm(ca @ cb)).real)


@pytest.mark.parametrize("n", [2, 20, 64, 500])
def test_distance_of_a_set_with_itself_is_zero(n: int) -> None:
    stats = FeatureStatistics.from_features(_features(n, 64))
    assert frechet_distance(stats, stats) <= 1e-12 * np.trace(stats.covariance())


@pytest.mark.parametrize("n", [20, 500])
def test_distance_of_shifted_sets_is_the_squared_shift(n: int) -> None:
    x, shift = _features(n, 64), np.linspace(-1, 2, 64)
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(x + shift)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift, rel=1e-12)


@pytest.mark.parametrize("n", [20, 500])
def test_distance_to_a_scaled_set_is_the_trace_times_the_squared_change(n: int) -> None:
    x = _features(n, 64)
    x -= x.mean(0)
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(3 * x)
    assert frechet_distance(a, b) == pytest.approx(4 * np.trace(a.covariance()), rel=1e-12)


def test_distance_equals_the_matrix_square_root_form_on_full_rank_data() -> None:
    x, y = _features(800, 48, seed=1), _features(600, 48, seed=2)
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    assert frechet_distance(a, b) == pytest.approx(_sqrtm_form(x, y), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_distance_of_orthogonal_low_rank_sets_is_the_sum_of_traces() -> None:
    x, y = _features(30, 40, seed=1), _features(30, 40, seed=2)
    x[:, 20:], y[:, :20] = 0, 0
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    delta = a.mean - b.mean
    expected = delta @ delta + np.trace(a.covariance()) + np.trace(b.covariance())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_merged_statistics_are_those_of_the_whole_in_any_order(
    sizes: list[int], random: object
) -> None:
    x = _features(sum(sizes), 16) + 100  # a large mean would spoil uncentred sums
    ends = list(itertools.accumulate(sizes, initial=0))
    parts = [FeatureStatistics.from_features(x[i:j]) for i, j in itertools.pairwise(ends)]
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = functools.reduce(FeatureStatistics.merge, parts)
    assert merged.count == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-13)
    scale = np.abs(np.cov(x.T)).max()
    np.testing.assert_allclose(merged.covariance(), np.cov(x.T), rtol=0, atol=1e-12 * scale)
    other = FeatureStatistics.from_features(_features(90, 16, seed=5))
    whole = FeatureStatistics.from_features(x)
    assert frechet_distance(merged, other) == pytest.approx(
        frechet_distance(whole, other), rel=1e-12
    )


def test_factor_never_outgrows_twice_the_dimension() -> None:
    parts = [FeatureStatistics.from_features(_features(7, 8, seed=i)) for i in range(40)]
    assert functools.reduce(FeatureStatistics.merge, parts).factor.shape[0] <= 16


def test_distance_refuses_too_few_vectors_and_what_is_not_finite() -> None:
    one, good = (
        FeatureStatistics.from_features(np.ones((1, 4))),
        FeatureStatistics.from_features(_features(9, 4)),
    )
    with pytest.raises(ValueError, match="2 vectors or more in each set, got 1 and 9"):
        frechet_distance(one, good)
    bad = FeatureStatistics.from_features(np.where(np.eye(9, 4) == 1, np.nan, 1.0))
    with pytest.raises(ValueError, match="infs or NaNs"):
        frechet_distance(bad, good)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 50))
def test_inception_score_lies_between_one_and_the_number_of_classes(
    seed: int, n: int, spread: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=(n, 10)) * spread
    score, deviation = inception_score([ClassStatistics.from_logits(logits)])
    assert 1 - 1e-12 <= score <= 10 + 1e-12
    assert deviation == 0


def test_inception_score_reaches_both_ends() -> None:
    same, sure = np.tile(np.arange(10.0), (30, 1)), np.tile(np.eye(10) * 1e4, (3, 1))
    assert inception_score([ClassStatistics.from_logits(same)])[0] == pytest.approx(1, abs=1e-12)
    assert inception_score([ClassStatistics.from_logits(sure)])[0] == pytest.approx(10, rel=1e-12)


def test_inception_score_streams_and_averages_over_splits() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 10)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    halves = [p[:30], p[30:]]
    direct = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in halves]
    streamed = [
        functools.reduce(
            ClassStatistics.merge, [ClassStatistics.from_logits(x) for x in np.split(half, 3)]
        )
        for half in np.split(logits, 2)
    ]
    assert inception_score(streamed) == pytest.approx((np.mean(direct), np.std(direct)), rel=1e-12)


def test_statistics_come_back_from_a_file_as_they_were() -> None:
    rng = np.random.default_rng(0)
    before = {
        name: Statistics(
            FeatureStatistics.from_features(rng.normal(size=(n, 8))),
            ClassStatistics.from_logits(rng.normal(size=(n, 5))),
        )
        for name, n in (("16-0", 3), ("32-1", 40))
    }
    after = unpack(pack(before))
    assert list(after) == list(before)
    for name, (features, classes) in before.items():
        assert (features.count, classes.count) == (
            after[name].features.count,
            after[name].classes.count,
        )
        np.testing.assert_array_equal(features.mean, after[name].features.mean)
        np.testing.assert_array_equal(features.factor, after[name].features.factor)
        np.testing.assert_array_equal(classes.sum_p, after[name].classes.sum_p)
        assert classes.sum_p_log_p == after[name].classes.sum_p_log_p
