"""What several seeds say about a difference: means, spreads, paired t intervals, Holm's correction, and a verdict.

A cell and its baseline are run with the same seeds, and a seed decides weights, order, noise and captions of both. So what is
looked at are the differences d_i of a seed's two numbers, i = 1 ... n:

    mean +- t_(n-1)(0.975) s / sqrt(n)          s the standard deviation of the d_i
    p    =  2 P(T_(n-1) > |mean| sqrt(n) / s)   of no difference (Student, 1908)

which takes them to be normal; with three seeds nobody can check that, and only large differences can be told from chance. Where
several cells are compared with one baseline, some difference would look real by chance; Holm (1979, "A Simple Sequentially
Rejective Multiple Test Procedure") raises the p values so that in 95 % of all such families none does:

    p'_(k) = max over j <= k of min(1, (m - j + 1) p_(j))     p_(1) <= ... <= p_(m)

Pure; called by `findings`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from scipy import stats

Name = TypeVar("Name")

LEVEL = 0.95
"""Of intervals; a verdict needs an adjusted p of at most one minus this."""

Direction = Literal["lower", "higher", "none"]
"""Which way is better; none for what is shown and not judged."""

Verdict = Literal["better", "worse", "no difference seen", "no spread", "not judged"]
"No spread: one seed, or all say the same to the last digit, as counts of few pictures may; nothing is known of chance then."

NOTHING = 1e-9
"""A deviation that is rounding alone, of the largest number."""


class Spread(NamedTuple):
    """Numbers of several seeds."""

    mean: float
    deviation: float
    "Standard deviation; NaN of one number."
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one number."""
        found = np.asarray(values, dtype=np.float64)
        deviation = float(found.std(ddof=1)) if len(found) > 1 else math.nan
        return cls(float(found.mean()), deviation, len(found))


class Difference(NamedTuple):
    """A cell less its baseline, over the seeds that both have."""

    mean: float
    low: float
    high: float
    "Ends of the 95 % interval; NaN without spread."
    p: float
    "Of no difference; NaN without spread, but 1 where all are equal."
    number: int
    "Seeds."


class Judged(NamedTuple):
    """A difference among others with the same baseline."""

    difference: Difference
    adjusted: float
    "Its p by Holm's correction; NaN without spread."
    verdict: Verdict


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The paired difference of two cells' numbers, seed by seed.

    Args:
        values: of a cell, finite, at least one.
        baseline: of the same seeds in the same order.

    Raises:
        ValueError: there is not one number of both for each seed.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(f"{len(values)} and {len(baseline)} numbers are no pairs")
    apart = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean, deviation, number = Spread.of(apart.tolist())
    rounding = NOTHING * max(map(abs, (*values, *baseline)))
    if number > 1 and float(np.abs(apart).max()) <= rounding:
        return Difference(0.0, 0.0, 0.0, 1.0, number)
    if number == 1 or deviation <= rounding:
        return Difference(mean, math.nan, math.nan, math.nan, number)
    error = deviation / math.sqrt(number)
    half = float(stats.t.ppf((1 + LEVEL) / 2, number - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, number - 1))
    return Difference(mean, mean - half, mean + half, p, number)


def holm(p: Sequence[float]) -> list[float]:
    """P values of one family by Holm's correction, in the order given; NaN stays, and counts for nothing."""
    known = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        adjusted[place] = largest
    return adjusted


def judge(
    cells: Mapping[Name, tuple[Sequence[float], Sequence[float]]], direction: Direction
) -> dict[Name, Judged]:
    """Cells that are compared with one baseline: one family.

    Args:
        cells: by any name, the numbers of a cell and of the baseline, of the same seeds.
        direction: which way is better.
    """
    found = {name: difference(*pair) for name, pair in cells.items()}
    adjusted = holm([each.p for each in found.values()])
    return {
        name: Judged(each, p, _verdict(each, p, direction))
        for (name, each), p in zip(found.items(), adjusted, strict=True)
    }


def _verdict(found: Difference, adjusted: float, direction: Direction) -> Verdict:
    if direction == "none":
        return "not judged"
    if math.isnan(found.p):
        return "no spread"
    if adjusted > 1 - LEVEL:
        return "no difference seen"
    return "better" if (found.mean < 0) == (direction == "lower") else "worse"
