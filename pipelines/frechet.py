"""Chance and bias of a Frechet distance: its standard error, and its limit for ever more pictures.

For sets of pictures with moments (m, C) and (m_r, C_r), where T is the linear map that transports the first Gaussian to the
second, T = C^-1/2 (C^1/2 C_r C^1/2)^1/2 C^-1/2, the influence of a picture with features x on the squared distance is

    phi(x) = 2 (m - m_r) . (x - m) + |x - m|^2 - (x - m)^T T (x - m)     + a constant,

because d tr (C C_r)^1/2 = tr (T dC) / 2. With C = Z L Z^T and (L^1/2 Z^T C_r Z L^1/2) = U S^2 U^T, T = K K^T for
K = Z L^-1/2 U S^1/2, so one matrix product with K gives the last term, for singular C in the space that its pictures span.

The expected distance of n pictures is the limit plus c / n + O(1 / n^2). Chong and Forsyth (2020, "Effectively Unbiased FID and
Inception Score and where to find them", https://arxiv.org/abs/1911.07023) measure it at several n and extrapolate the line over
1 / n to 0: FID-infinity. Called by `scores` and `scoring`.
"""

import math

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from numpy import ndarray

from pipelines.estimates import Estimate
from pipelines.metrics import FeatureStatistics, frechet_distance

NUM_POINTS = 15
"""Of the fit over 1 / n, as in the paper."""

LARGEST_FIRST_POINT = 5000
"""The paper's smallest subset, of 50,000 pictures; fewer pictures begin at `FIRST_SHARE` of theirs."""
FIRST_SHARE = 0.5

TRUSTED_RATIO = 4
"""Pictures a feature from which the limit has an interval. With fewer the distance is no line over 1 / n."""

_BLOCK = 4096
"""Rows whose products are in memory at once."""


def frechet_estimate(
    features: Float[ndarray, "n d"],
    reference: FeatureStatistics,
    statistics: FeatureStatistics | None = None,
) -> Estimate:
    """Return the squared Frechet distance of a set of features to the reference.

    Args:
        features: of the pictures drawn, n >= 2.
        reference: what they are compared with; taken as it is, without chance of its own.
        statistics: those of `features`, where they are known already.

    Raises:
        ValueError: as `frechet_distance`.
    """
    own = statistics or FeatureStatistics.from_features(features)
    value = frechet_distance(own, reference)
    return Estimate.from_influence(value, frechet_influence(features, own, reference))


def frechet_influence(
    features: Float[ndarray, "n d"], own: FeatureStatistics, reference: FeatureStatistics
) -> Float[ndarray, " n"]:
    """Return phi of each picture of a set, whose statistics are `own`, without the constant."""
    values, vectors = _principal(own)
    root = vectors * np.sqrt(values)
    across = reference.factor @ root / np.sqrt(reference.count - 1)
    squares, turn = scipy.linalg.eigh(across.T @ across, check_finite=False)
    transport = (vectors / np.sqrt(values)) @ (turn * np.sqrt(np.sqrt(np.maximum(squares, 0))))
    influence = np.empty(len(features))
    for start in range(0, len(features), _BLOCK):
        x = np.asarray(features[start : start + _BLOCK], dtype=np.float64) - own.mean
        influence[start : start + _BLOCK] = (
            2 * x @ (own.mean - reference.mean)
            + np.square(x).sum(1)
            - np.square(x @ transport).sum(1)
        )
    return influence


def _principal(
    statistics: FeatureStatistics,
) -> tuple[Float[ndarray, " k"], Float[ndarray, "d k"]]:
    """Variances and directions in which the pictures differ: of few pictures from their own factor, which is smaller."""
    rows, dim = statistics.factor.shape
    if rows < dim:
        _, singular, turned = scipy.linalg.svd(
            statistics.factor, full_matrices=False, check_finite=False
        )
        values, vectors = np.square(singular) / (statistics.count - 1), turned.T
    else:
        values, vectors = scipy.linalg.eigh(statistics.covariance(), check_finite=False)
    # Below: what rounding makes of directions in which the pictures do not differ.
    kept = values > 10 * dim * np.finfo(np.float64).eps * values.max()
    return values[kept], vectors[:, kept]


def frechet_infinity(
    features: Float[ndarray, "n d"],
    reference: FeatureStatistics,
    at_all: Estimate,
    *,
    first: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Return the distance that ever more pictures would have.

    The subsets' sizes lie evenly between `first` and n; the one of each size is drawn from (seed, size) alone, without
    replacement, and the last is the whole set.

    Args:
        features: of the pictures drawn.
        reference: what they are compared with.
        at_all: distance of all of them, from `frechet_estimate`.
        first: pictures of the smallest subset; None for 5,000, or half of them if those are fewer than 10,000.
        seed: of the subsets.

    Returns:
        The intercept; its standard error adds the fit's to that of `at_all`, which has the same influence function, and is
        NaN below `TRUSTED_RATIO` pictures a feature.

    Raises:
        ValueError: `first` is not from 2 to n - 2.
    """
    n = len(features)
    first = min(LARGEST_FIRST_POINT, int(n * FIRST_SHARE)) if first is None else first
    if not 2 <= first <= n - 2:
        raise ValueError(f"frechet_infinity: first={first} must be from 2 to {n - 2}, n less 2")
    sizes = np.unique(np.linspace(first, n, NUM_POINTS).round().astype(int))
    distances = [_of_subset(features, reference, int(size), seed) for size in sizes[:-1]]
    limit, of_fit = _extrapolated(sizes, np.array([*distances, at_all.value]))
    trusted = n >= TRUSTED_RATIO * features.shape[1]
    return Estimate(limit, math.hypot(at_all.standard_error, of_fit) if trusted else math.nan)


def _of_subset(
    features: Float[ndarray, "n d"], reference: FeatureStatistics, size: int, seed: int
) -> float:
    rows = np.random.default_rng((seed, size)).choice(len(features), size, replace=False)
    return frechet_distance(FeatureStatistics.from_features(features[np.sort(rows)]), reference)


def _extrapolated(
    sizes: Int[ndarray, " points"], distances: Float[ndarray, " points"]
) -> tuple[float, float]:
    """Intercept of the least-squares line of distances over 1 / sizes, and its standard error."""
    design = np.stack([np.ones(len(sizes)), 1 / sizes], axis=1)
    line, residuals, _, _ = np.linalg.lstsq(design, distances, rcond=None)
    freedom = len(sizes) - 2
    variance = residuals.item() / freedom if freedom else 0.0
    return float(line[0]), math.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
