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
    frechet_distance,
    inception_score,
    inception_score_of,
    split_of_each,
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


def test_distance_is_torch_fidelitys() -> None:
    """torch_fidelity.metric_fid of torch-fidelity 0.4.0 on these features as float64 tensors; it is good to 1e-11 itself."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / np.sqrt(24)
    x, y = rng.normal(size=(230, 24)) @ mix + 0.1, rng.normal(size=(250, 24)) @ mix * 1.1
    a, b = FeatureStatistics.from_features(x), FeatureStatistics.from_features(y)
    assert frechet_distance(a, b) == pytest.approx(1.6472538605170897, rel=1e-11)


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


def _fixed_logits() -> np.ndarray:
    """What torch-fidelity was given for the numbers below."""
    rng = np.random.default_rng(0)
    rng.normal(size=(24, 24)), rng.normal(size=(230, 24)), rng.normal(size=(250, 24))
    return rng.normal(size=(230, 12)) * 3


def test_inception_score_is_torch_fidelitys() -> None:
    """torch_fidelity.metric_isc.isc_features_to_metric of torch-fidelity 0.4.0, given these logits as a float64 tensor."""
    found = inception_score_of(_fixed_logits())
    expected = (3.739783110658564, 0.28941407567429195)
    assert (found.score.value, found.deviation) == pytest.approx(expected, rel=1e-12)


def test_inception_score_of_blocks_and_of_the_whole_is_one_number() -> None:
    """The parts of each block, by the number of each picture, add up to the splits."""
    logits = _fixed_logits()
    split = split_of_each(230, 10)
    parts: dict[int, ClassStatistics] = {}
    for block in np.array_split(np.arange(230), 9):
        for number in np.unique(split[block]):
            of_block = ClassStatistics.from_logits(logits[block[split[block] == number]])
            parts[number] = parts[number].merge(of_block) if number in parts else of_block
    streamed = inception_score([parts[number] for number in range(10)])
    found = inception_score_of(logits)
    assert streamed == pytest.approx((found.score.value, found.deviation), rel=1e-12)


@given(st.integers(1, 500), st.integers(1, 12))
def test_splits_are_as_equal_as_can_be(num_images: int, num_splits: int) -> None:
    if num_splits > num_images:
        with pytest.raises(ValueError, match=f"from 1 to {num_images}"):
            split_of_each(num_images, num_splits)
        return
    sizes = np.bincount(split_of_each(num_images, num_splits), minlength=num_splits)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.sum() == num_images


def test_inception_scores_standard_error_is_the_deviation_over_draws() -> None:
    mix = np.random.default_rng(0).normal(size=(6, 10))
    draws = np.array(
        [
            inception_score_of(np.random.default_rng(seed).normal(size=(400, 6)) @ mix, 2).score
            for seed in range(100)
        ]
    )
    assert draws[:, 1].mean() == pytest.approx(draws[:, 0].std(ddof=1), rel=0.25)
