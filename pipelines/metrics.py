"""Frechet distance and Inception-style score from statistics that merge.

A set of n feature vectors with mean m is kept as (n, m, R) where R is any matrix with R^T R = S, the scatter
S = sum_i (f_i - m)(f_i - m)^T. Two sets merge by Chan, Golub and LeVeque (1979, "Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances"):

    S = S_a + S_b + (n_a n_b / n) d d^T,   d = m_b - m_a

which for the factor R is stacking rows: R_a, R_b and sqrt(n_a n_b / n) d^T. When the rows outgrow the dimension a QR
decomposition brings them back. Keeping R and not S never squares the condition number, so the distance between
Gaussians (Dowson and Landau, 1982; Heusel et al., 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a
Local Nash Equilibrium", https://arxiv.org/abs/1706.08500, section 4)

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2),   C = S / (n - 1)

needs no matrix square root: the eigenvalues of C_a C_b are the squared singular values of R_a R_b^T over
(n_a - 1)(n_b - 1), so the last trace is a sum of singular values. That is exact for singular covariances (n <= d, where
the matrix has only about n_a x n_b entries) as well as for full-rank ones.

The Inception score (Salimans et al., 2016, "Improved Techniques for Training GANs", https://arxiv.org/abs/1606.03498,
section 4) is exp(mean_i KL(p_i || mean p)) = exp(mean_i sum_c p log p + H(mean p)): (n, sum p, sum p log p) suffice.

Everything is float64 numpy. Called by `feature_store`, `frechet`, `scores` and `running_score`.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int
from numpy import ndarray

from pipelines.estimates import Estimate

SHUFFLE_SEED = 2020
"""torch-fidelity's, of pictures before they are split and of subsets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStatistics:
    """Count, mean and a factor of the scatter of a set of feature vectors."""

    count: int
    """Vectors in the set."""
    mean: Float[ndarray, " d"]
    """Their mean."""
    factor: Float[ndarray, "rows d"]
    """R with R^T R the scatter around the mean; at most 2 d rows."""

    @classmethod
    def from_features(cls, features: Float[Any, "n d"]) -> "FeatureStatistics":
        """Return the statistics of the rows of `features` (n >= 1)."""
        x = np.asarray(features, dtype=np.float64)
        mean = x.mean(0)
        return cls(count=len(x), mean=mean, factor=_bounded(x - mean))

    @classmethod
    def from_blocks(cls, blocks: Iterable[Float[Any, "_n d"]]) -> "FeatureStatistics":
        """Return the statistics of all rows of many blocks, merged in their order: in flat memory, however many.

        Raises:
            ValueError: there is no block.
        """
        parts = map(cls.from_features, blocks)
        total = next(parts, None)
        if total is None:
            raise ValueError("no features to take statistics of")
        return functools.reduce(cls.merge, parts, total)

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of the union of two disjoint sets."""
        count = self.count + other.count
        delta = other.mean - self.mean
        between = np.sqrt(self.count * other.count / count) * delta
        return FeatureStatistics(
            count=count,
            mean=self.mean + delta * (other.count / count),
            factor=_bounded(np.concatenate([self.factor, other.factor, between[None]])),
        )

    def covariance(self) -> Float[ndarray, "d d"]:
        """Return the covariance matrix, normalised by n - 1."""
        scatter: ndarray = self.factor.T @ self.factor
        return scatter / (self.count - 1)


def _bounded(factor: Float[ndarray, "rows d"]) -> Float[ndarray, "rows d"]:
    """Return a factor of the same scatter; one with more than 2 d rows comes back with d, so merging costs O(d^2) a row."""
    rows, dim = factor.shape
    if rows > 2 * dim:
        factor = scipy.linalg.qr(factor, mode="r", check_finite=False)[0][:dim]
    return factor


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet (2-Wasserstein) distance of the Gaussians with the moments of two sets.

    Both sets need two vectors or more. The estimate is biased upwards by about c / n: compare equal n only.

    Raises:
        ValueError: a set has fewer than two vectors, or a feature is not finite.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(
            f"frechet_distance needs 2 vectors or more in each set, got {a.count} and {b.count}"
        )
    # Product and singular values by one library: after a product of numpy's own its threads spin for a while and take the
    # cores from scipy's. svdvals refuses what is not finite.
    scale = 1 / np.sqrt((a.count - 1) * (b.count - 1))
    product = scipy.linalg.blas.dgemm(scale, a.factor.T, b.factor.T, trans_a=True)
    cross = scipy.linalg.svdvals(product, overwrite_a=True).sum()  # tr (C_a C_b)^(1/2)
    traces = sum(np.square(x.factor).sum() / (x.count - 1) for x in (a, b))
    delta = a.mean - b.mean
    return float(max(0.0, delta @ delta + traces - 2 * cross))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassStatistics:
    """What the Inception score needs of a set of class distributions p_i."""

    count: int
    """Distributions in the set."""
    sum_p: Float[ndarray, " classes"]
    """sum_i p_i."""
    sum_p_log_p: float
    """sum_i sum_c p_ic log p_ic, in nats."""

    @classmethod
    def from_logits(cls, logits: Float[Any, "n classes"]) -> "ClassStatistics":
        """Return the statistics of softmax(logits), row by row."""
        log_p = _log_softmax(logits)
        p = np.exp(log_p)
        return cls(count=len(p), sum_p=p.sum(0), sum_p_log_p=float((p * log_p).sum()))

    def merge(self, other: "ClassStatistics") -> "ClassStatistics":
        """Return the statistics of the union of two disjoint sets."""
        return ClassStatistics(
            count=self.count + other.count,
            sum_p=self.sum_p + other.sum_p,
            sum_p_log_p=self.sum_p_log_p + other.sum_p_log_p,
        )


def inception_score(splits: Sequence[ClassStatistics]) -> tuple[float, float]:
    """Return the mean and the standard deviation (ddof 0) over splits of exp(mean KL(p_i || mean p)), in [1, classes]."""
    scores = []
    for split in splits:
        mean = split.sum_p / split.count
        entropy = -(mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny))).sum()
        scores.append(np.exp(split.sum_p_log_p / split.count + entropy))
    return float(np.mean(scores)), float(np.std(scores))


def split_of_each(num_images: int, num_splits: int, seed: int = SHUFFLE_SEED) -> Int[ndarray, " n"]:
    """Return which part of the Inception score each picture belongs to, from 0.

    Pictures are shuffled by `seed` and cut into parts as equal as can be, by torch-fidelity's rule, so that with its 10
    splits and its seed the score is the same number.

    Raises:
        ValueError: there are fewer pictures than parts.
    """
    if not 1 <= num_splits <= num_images:
        raise ValueError(
            f"num_splits={num_splits} must be from 1 to {num_images}, the number of pictures"
        )
    ends = np.arange(num_splits + 1) * num_images // num_splits
    split = np.empty(num_images, dtype=np.int64)
    shuffled = np.random.RandomState(seed).permutation(num_images)
    split[shuffled] = np.repeat(np.arange(num_splits), np.diff(ends))
    return split


class InceptionScore(NamedTuple):
    """The score, and what publications write after the plus-minus sign."""

    score: Estimate
    deviation: float
    """Standard deviation (ddof 0) over the splits: no standard error, for it does not shrink with their number."""


def inception_score_of(
    logits: Float[Any, "n classes"], num_splits: int = 10, seed: int = SHUFFLE_SEED
) -> InceptionScore:
    """Return the Inception score of all pictures, given in their order.

    The influence of a picture on exp(mean KL(p_i || mean p)) is that number times KL(p_i || mean p), less a constant.

    Raises:
        ValueError: as `split_of_each`.
    """
    split = split_of_each(len(logits), num_splits, seed)
    parts, variances = [], []
    for number in range(num_splits):
        rows = np.asarray(logits)[split == number]
        part = ClassStatistics.from_logits(rows)
        parts.append(part)
        score, _ = inception_score([part])
        log_p = _log_softmax(rows)
        log_mean = np.log(np.maximum(part.sum_p / part.count, np.finfo(np.float64).tiny))
        divergence = (np.exp(log_p) * (log_p - log_mean)).sum(1)
        of_split = divergence.var(ddof=1) if len(rows) > 1 else np.nan
        variances.append(score**2 * of_split / len(rows))
    mean, deviation = inception_score(parts)
    return InceptionScore(Estimate(mean, float(np.sqrt(sum(variances)) / num_splits)), deviation)


def _log_softmax(logits: Float[Any, "n classes"]) -> Float[ndarray, "n classes"]:
    x = np.asarray(logits, dtype=np.float64)
    normalised: ndarray = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    return normalised
