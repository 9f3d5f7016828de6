"""Frechet distance against `scipy.linalg.sqrtm` in the same run: time and error.

    python tests/benchmarks/bench_metrics.py [dimension]

Both start from the statistics each keeps (ours a factor, scipy's mean and covariance); what making ours from all
features at once takes is `factor_seconds`. The reference is sum(svdvals(L1^T L2)) over the eigendecompositions of both
covariances. The features have a spectrum that falls like 1/i, as real ones do; n = 128 is the demo, n = 1.1 d is nearly singular.
"""

import sys
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import scipy.linalg

from pipelines.metrics import FeatureStatistics, frechet_distance


def _features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (rng.normal(size=(n, d)) / (1 + np.arange(d))) @ basis + 0.01 * rng.normal(size=d)


T = TypeVar("T")
Moments = tuple[np.ndarray, np.ndarray]


def _from_trace(a: Moments, b: Moments, cross: Callable[[np.ndarray, np.ndarray], float]) -> float:
    delta = a[0] - b[0]
    return float(delta @ delta + np.trace(a[1]) + np.trace(b[1]) - 2 * cross(a[1], b[1]))


def _reference_trace(ca: np.ndarray, cb: np.ndarray) -> float:
    roots = [
        vectors * np.sqrt(np.maximum(values, 0))
        for values, vectors in map(scipy.linalg.eigh, (ca, cb))
    ]
    return float(scipy.linalg.svdvals(roots[0].T @ roots[1]).sum())


def _sqrtm_trace(ca: np.ndarray, cb: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Matrix is singular": that is the point
        return float(np.trace(scipy.linalg.sqrtm(ca @ cb)).real)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    value = function()
    return value, time.perf_counter() - start


def compare(n: int, dim: int) -> str:
    """Return one line: times and errors of both methods for two sets of `n` features."""
    x, y = _features(n, dim, 1), _features(n, dim, 2) * 1.1
    a, b = ((z.mean(0), np.cov(z.T)) for z in (x, y))
    reference = _from_trace(a, b, _reference_trace)
    factors, factor_seconds = _timed(lambda: [FeatureStatistics.from_features(z) for z in (x, y)])
    ours, seconds = _timed(lambda: frechet_distance(*factors))
    theirs, sqrtm_seconds = _timed(lambda: _from_trace(a, b, _sqrtm_trace))
    return (
        f"d={dim} n={n} factor_seconds={factor_seconds:.3f} ours_seconds={seconds:.3f} "
        f"sqrtm_seconds={sqrtm_seconds:.3f} ratio={seconds / sqrtm_seconds:.4f} "
        f"ours_error={abs(ours / reference - 1):.1e} sqrtm_error={abs(theirs / reference - 1):.1e}"
    )


def main(dim: int) -> None:
    """Write one line a sample size."""
    for n in (128, int(1.1 * dim), 3 * dim):
        sys.stdout.write(compare(n, dim) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
