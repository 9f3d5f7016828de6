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

Everything is float64 numpy. Called by `pipelines.evaluate`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy import ndarray


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
    ra, rb = a.factor / np.sqrt(a.count - 1), b.factor / np.sqrt(b.count - 1)
    cross = scipy.linalg.svdvals(
        ra @ rb.T
    ).sum()  # tr (C_a C_b)^(1/2); svdvals refuses what is not finite
    delta = a.mean - b.mean
    return float(max(0.0, delta @ delta + (ra * ra).sum() + (rb * rb).sum() - 2 * cross))


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
        x = np.asarray(logits, dtype=np.float64)
        log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
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


class Statistics(NamedTuple):
    """Both kinds, of the same pictures."""

    features: FeatureStatistics
    classes: ClassStatistics

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of the union of two disjoint sets."""
        return Statistics(self.features.merge(other.features), self.classes.merge(other.classes))


def pack(named: Mapping[str, Statistics]) -> bytes:
    """Return an npz file, without a pickle; names must hold no slash."""
    arrays = {
        f"{name}/{part}/{field.name}": getattr(values, field.name)
        for name, statistics in named.items()
        for part, values in statistics._asdict().items()
        for field in fields(values)
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def unpack(content: bytes) -> dict[str, Statistics]:
    """Return what `pack` was given."""
    tree: dict[str, dict[str, dict[str, Any]]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for key, array in arrays.items():
            name, part, field = key.split("/")
            value = array if array.ndim else array.item()
            tree.setdefault(name, {}).setdefault(part, {})[field] = value
    return {
        name: Statistics(
            FeatureStatistics(**parts["features"]), ClassStatistics(**parts["classes"])
        )
        for name, parts in tree.items()
    }


def score_table(result: dict[str, Any]) -> str:
    """The content of ``metrics.json`` as a small table: a column for each resolution."""
    scores, settings = result["scores"], result["settings"]
    lines = ["".join([" " * 16, *(f"{resolution + ' px':>10}" for resolution in scores)])]
    for name in next(iter(scores.values())):
        if not name.startswith(("fd_", "is_")) or name.endswith("_std"):
            continue
        rows = {name: list(scores.values())}
        for kind in ("untrained", "reference"):
            rows[f"  {kind}"] = [entry.get(kind, {}) for entry in scores.values()]
        for label, entries in rows.items():
            if name in entries[0]:
                lines.append("".join([f"{label:16}", *(f"{e[name]:10.2f}" for e in entries)]))
    lines.append(
        f"{settings['num_images']} pictures drawn, {settings['num_references']} of {settings['split']} as reference"
    )
    return "\n".join(lines)
