"""Distances by kernels, of features or embeddings: KID and CMMD; and the CLIP score.

The squared maximum mean discrepancy of two distributions, for x, x' of one and y, y' of the other, is
E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al., 2012, "A Kernel Two-Sample Test", lemma 6).

* KID (Binkowski et al., 2018, "Demystifying MMD GANs", https://arxiv.org/abs/1801.01401, section 4): the cubic kernel
  (x . y / d + 1)^3, estimated without bias from subsets. Subsets are torch-fidelity's, draw by draw.
* CMMD (Jayasumana et al., 2024, "Rethinking FID", https://arxiv.org/abs/2401.09603, section 4): the Gaussian kernel of width 10
  on CLIP's normalised embeddings, times 1000, with the terms i = i kept, as in the authors' code.
* CLIP score (Hessel et al., 2021, "CLIPScore", https://arxiv.org/abs/2104.08718, equation 1): mean of w max(cos(image, text), 0).

The influence of picture x on either discrepancy is 2 (E k(x, x') - E k(x, y)), less a constant. Everything is float64 numpy.
Called by `scores` and `scoring`.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from pipelines.estimates import Estimate
from pipelines.metrics import SHUFFLE_SEED

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""Of KID, as torch-fidelity has them."""

CMMD_WIDTH, CMMD_SCALE = 10.0, 1000.0
CLIP_SCALE = 100.0
"""The w in use for text to image; Hessel et al. have 2.5."""

_BLOCK = 1024
"""Rows of a kernel matrix that are in memory at once."""


class KernelDistance(NamedTuple):
    """KID, and the deviation that torch-fidelity prints."""

    distance: Estimate
    deviation: float
    """Standard deviation (ddof 0) over the subsets; no standard error of the mean, whose subsets share pictures."""


def kernel_inception_distance(
    features: Float[ndarray, "n d"],
    reference: Float[ndarray, "m d"],
    *,
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SHUFFLE_SEED,
) -> KernelDistance:
    """Return KID, which may be slightly negative: it has no bias.

    The standard error joins two: of the mean over all subsets there are, by the influence of each picture, and of having
    drawn only `num_subsets` of them.

    Raises:
        ValueError: a set has fewer than `subset_size` pictures.
    """
    n, m = len(features), len(reference)
    if not 2 <= subset_size <= min(n, m):
        raise ValueError(
            f"subset_size={subset_size} must be from 2 to {min(n, m)}, the pictures of the smaller "
            f"of the two sets ({n} and {m})"
        )
    rng = np.random.RandomState(seed)
    distances, influence, times = np.empty(num_subsets), np.zeros(n), np.zeros(n)
    for number in range(num_subsets):
        rows = rng.choice(n, subset_size, replace=False)
        others = rng.choice(m, subset_size, replace=False)
        distances[number], of_rows = _unbiased(features[rows], reference[others])
        influence[rows] += of_rows
        times[rows] += 1
    seen = times > 0
    of_all = Estimate.from_influence(0, influence[seen] / times[seen]).standard_error
    of_all *= math.sqrt(seen.sum() / n)
    deviation = float(distances.std())
    error = math.sqrt(of_all**2 + deviation**2 / num_subsets)
    return KernelDistance(Estimate(float(distances.mean()), error), deviation)


def _unbiased(
    x: Float[ndarray, "k d"], y: Float[ndarray, "k d"]
) -> tuple[float, Float[ndarray, " k"]]:
    """Squared discrepancy without the terms i = i, and the influence of each row of `x`."""
    k = len(x)
    x, y = x.astype(np.float64), y.astype(np.float64)
    within = [_sums_without_diagonal(z) / (k - 1) for z in (x, y)]
    between = _cubic(x, y).mean(1)
    distance = within[0].mean() + within[1].mean() - 2 * between.mean()
    return float(distance), 2 * (within[0] - between)


def _sums_without_diagonal(x: Float[ndarray, "k d"]) -> Float[ndarray, " k"]:
    kernel = _cubic(x, x)
    np.fill_diagonal(kernel, 0)
    sums: ndarray = kernel.sum(1)
    return sums


def _cubic(x: Float[ndarray, "k d"], y: Float[ndarray, "l d"]) -> Float[ndarray, "k l"]:
    base = x @ y.T
    base /= x.shape[1]
    base += 1
    kernel: ndarray = base * base * base  # a power of numpy's takes ten times as long
    return kernel


def clip_maximum_mean_discrepancy(
    images: Float[ndarray, "n d"], reference: Float[ndarray, "m d"]
) -> Estimate:
    """Return CMMD of CLIP's image embeddings (n >= 2, m >= 1), which are normalised here."""
    x, y = _normalised(images), _normalised(reference)
    within, between = _mean_similarity(x, x), _mean_similarity(x, y)
    distance = within.mean() + _mean_similarity(y, y).mean() - 2 * between.mean()
    influence = CMMD_SCALE * 2 * (within - between)
    return Estimate.from_influence(CMMD_SCALE * distance, influence)


def _mean_similarity(x: Float[ndarray, "n d"], y: Float[ndarray, "m d"]) -> Float[ndarray, " n"]:
    """Mean over `y` of the Gaussian kernel less 1, for each `x`; the ones cancel, and digits would with them."""
    means = [
        np.expm1((x[start : start + _BLOCK] @ y.T - 1) / CMMD_WIDTH**2).mean(1)
        for start in range(0, len(x), _BLOCK)
    ]
    return np.concatenate(means)


def clip_score(
    images: Float[ndarray, "n d"], texts: Float[ndarray, "n d"], scale: float = CLIP_SCALE
) -> Estimate:
    """Return the mean of `scale` max(cos, 0) over pairs of an image's and its caption's CLIP embeddings (n >= 2)."""
    cosines = (_normalised(images) * _normalised(texts)).sum(1)
    return Estimate.mean(scale * np.maximum(cosines, 0))


def _normalised(x: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
    x = np.asarray(x, dtype=np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"embedding {int(lengths.argmin())} is zero, so it has no direction")
    directions: ndarray = x / lengths
    return directions
