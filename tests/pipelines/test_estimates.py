"""Standard errors hold what they promise: the expected score lies in the interval as often as it says."""

import numpy as np
import pytest

from pipelines.estimates import Estimate


def test_the_estimate_of_a_mean_is_that_of_statistics() -> None:
    values = np.random.default_rng(0).normal(size=50)
    estimate = Estimate.mean(values)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.standard_error == pytest.approx(np.sqrt(np.cov(values) / 50))
    low, high = estimate.interval(0.95)
    assert (high - low) / 2 == pytest.approx(1.959964 * estimate.standard_error, rel=1e-6)
    assert low + high == pytest.approx(2 * estimate.value)


def test_a_wider_level_gives_a_wider_interval() -> None:
    widths = [np.diff(Estimate(1.0, 0.5).interval(level)).item() for level in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
