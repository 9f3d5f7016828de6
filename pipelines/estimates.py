"""A score and how far chance alone moves it.

Every score here is a function of the pictures that were drawn, compared with a reference that is given: drawn anew with other
seeds they would give another value. `Estimate` holds the value with the standard deviation of that chance, found by the
infinitesimal jackknife (Jaeckel, 1972; Efron, 1982, "The Jackknife, the Bootstrap and Other Resampling Plans", chapter 6): with
phi_i the derivative of the score by the weight of picture i, which is its influence function at that picture,

    standard error = sqrt(sum_i (phi_i - mean phi)^2 / (n - 1)) / sqrt(n).

It is what the bootstrap's standard deviation tends to, without its resampling. The usual bootstrap interval, percentiles over
sets drawn with replacement, would be wrong for a distance of Frechet's kind: a resampled set has a third fewer different
pictures, so its distance lies as far above the value as the value above the truth, and below about 10 pictures a dimension the
interval does not hold the value itself (docs/evaluation.md has the figures).

What an interval says is where another draw of *as many* pictures would put the score. The bias that a score has at this number
of pictures is not chance, and is not in it. Called by the modules of the single scores.
"""

import math
import statistics
from typing import NamedTuple

from jaxtyping import Float
from numpy import ndarray


class Estimate(NamedTuple):
    """A score with its standard error; NaN where that is not known."""

    value: float
    standard_error: float

    @classmethod
    def from_influence(cls, value: float, influence: Float[ndarray, " n"]) -> "Estimate":
        """Return the estimate of a score whose derivatives by the pictures' weights are `influence` (n >= 2)."""
        return cls(float(value), float(influence.std(ddof=1) / math.sqrt(len(influence))))

    @classmethod
    def mean(cls, values: Float[ndarray, " n"]) -> "Estimate":
        """Return the mean of values, one a picture (n >= 2)."""
        return cls.from_influence(float(values.mean()), values)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the normal interval that holds the expected score in `level` of all draws; (NaN, NaN) where unknown."""
        half = statistics.NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return self.value - half, self.value + half
