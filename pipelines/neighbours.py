"""Scores by nearest neighbours in feature space, and nearest pictures.

The manifold of a set is the union of balls around its pictures that reach to their k-th nearest others.

* precision: share of the pictures drawn that lie in the reference's manifold; recall: share of the reference in theirs
  (Kynkaanniemi et al., 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
  https://arxiv.org/abs/1904.06991, equations 1 and 2; k = 3, which has the authors' default).
* density: how many of the reference's balls a picture drawn lies in, over k; coverage: share of the reference's balls that
  hold a picture drawn (Naeem et al., 2020, "Reliable Fidelity and Diversity Metrics for Generative Models",
  https://arxiv.org/abs/2002.09797, equations 3 and 4; k = 5). Unlike recall they are not fooled by a few outliers.

All four change with the numbers of pictures: compare equal ones only. Distances are computed in blocks of rows, so that memory
grows with n, not n^2. Precision and density are means over the pictures drawn, with the standard error of a mean. Recall and
coverage are not smooth in the pictures, so theirs is a jackknife that leaves out a twentieth of the pictures at a time (Shao and
Wu, 1989, "A General Theory for Jackknife Variance Estimation"). Called by `scores`, `nearest` by `scoring`.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from pipelines.estimates import Estimate

PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
NUM_GROUPS = 20
"""Of pictures, left out one at a time for a standard error."""

_BLOCK = 512
"""Rows of a distance matrix that are in memory at once."""
_SAME = 1e-12
"""Squared distances below this share of the squared lengths are rounding, and count as 0."""


class Neighbourhood(NamedTuple):
    """The four scores."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbourhood(
    features: Float[ndarray, "n d"], reference: Float[ndarray, "m d"], *, seed: int = 0
) -> Neighbourhood:
    """Return precision, recall, density and coverage of a set of features.

    Args:
        features: of the pictures drawn.
        reference: of real ones.
        seed: of the groups for the standard errors.

    Raises:
        ValueError: a set has too few pictures to have a fifth neighbour.
    """
    least = DENSITY_NEIGHBOURS + 1
    if min(len(features), len(reference)) < least:
        raise ValueError(
            f"precision and recall need {least} pictures or more in each set, "
            f"got {len(features)} and {len(reference)}"
        )
    centre = reference.mean(0, dtype=np.float64)  # shorter vectors are rounded less
    x, y = features - centre, reference - centre
    groups = min(NUM_GROUPS, len(x))
    group = np.random.default_rng(seed).permutation(len(x)) % groups
    near, far = (r[:, 0] for r in _radii(y, [PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS]))
    (drawn,) = _radii(x, [PRECISION_NEIGHBOURS], group)
    inside, balls = np.empty(len(x)), np.empty(len(x))
    for rows, squares in _squared_distances(x, y):
        inside[rows] = (squares <= near).any(1)
        balls[rows] = (squares <= far).sum(1)
    recalled = np.empty((len(y), groups + 1), dtype=bool)
    covered = np.empty((len(y), groups + 1), dtype=bool)
    for rows, squares in _squared_distances(y, x):
        row, of = np.nonzero(squares <= drawn.max(1))
        within = (squares[row, of] <= radius[of] for radius in drawn.T)
        recalled[rows] = _held(len(squares), row, group[of], within, groups)
        row, of = np.nonzero(squares <= far[rows, None])
        all_of_them = itertools.repeat(np.ones(len(of), dtype=bool))
        covered[rows] = _held(len(squares), row, group[of], all_of_them, groups)
    return Neighbourhood(
        Estimate.mean(inside),
        _jackknife(recalled),
        Estimate.mean(balls / DENSITY_NEIGHBOURS),
        _jackknife(covered),
    )


def nearest(
    queries: Float[ndarray, "q d"], blocks: Iterable[Float[ndarray, "_b d"]], k: int
) -> tuple[Float[ndarray, "q k"], Int[ndarray, "q k"]]:
    """Return distance and number of the `k` nearest of many features, nearest first.

    Args:
        queries: features to find neighbours of.
        blocks: the many, some at a time; they are numbered through from 0 and must be `k` or more.
        k: neighbours of each query.
    """
    distances: ndarray = np.empty((len(queries), 0))
    numbers: ndarray = np.empty((len(queries), 0), dtype=np.int64)
    first = 0
    for block in blocks:
        for rows, squares in _squared_distances(block, queries):
            distances = np.concatenate([distances, np.sqrt(squares.T)], axis=1)
            found = np.broadcast_to(np.arange(rows.start, rows.stop) + first, squares.T.shape)
            numbers = np.concatenate([numbers, found], axis=1)
            order = np.argsort(distances, axis=1, kind="stable")[:, :k]
            distances, numbers = (
                np.take_along_axis(values, order, axis=1) for values in (distances, numbers)
            )
        first += len(block)
    if first < k:
        raise ValueError(f"k={k} nearest of {first} pictures: there are not as many")
    return distances, numbers


def _squared_distances(
    x: Float[ndarray, "n d"], y: Float[ndarray, "m d"]
) -> Iterator[tuple[slice, Float[ndarray, "_b m"]]]:
    """Squared distances of some rows of `x` at a time to all of `y`."""
    y = np.asarray(y, dtype=np.float64)
    y_squares = np.square(y).sum(1)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(x)))
        block = np.asarray(x[rows], dtype=np.float64)
        lengths = np.square(block).sum(1)[:, None] + y_squares
        squares = lengths - 2 * (block @ y.T)
        squares[squares < _SAME * lengths] = 0
        yield rows, squares


def _radii(
    x: Float[ndarray, "n d"], neighbours: Sequence[int], group: Int[ndarray, " n"] | None = None
) -> list[Float[ndarray, "n columns"]]:
    """Squared distance of each row to its k-th nearest other, for each k of `neighbours`.

    The first column is that among all; column g + 1, for rows in groups, that among all but group g.
    """
    members = [np.arange(len(x))] if group is None else [group == g for g in range(group.max() + 1)]
    columns = 1 if group is None else len(members) + 1
    found = [np.empty((len(x), columns)) for _ in neighbours]
    for rows, squares in _squared_distances(x, x):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        # The nearest of each group are enough.
        nearest_of = [_smallest(squares[:, member], max(neighbours)) for member in members]
        for column in range(columns):
            left = [part for g, part in enumerate(nearest_of) if g + 1 != column]
            ordered = np.sort(np.concatenate(left, axis=1), axis=1)
            for radii, k in zip(found, neighbours, strict=True):
                radii[rows, column] = ordered[:, k - 1]
    return found


def _smallest(values: Float[ndarray, "b n"], k: int) -> Float[ndarray, "b _k"]:
    return values if values.shape[1] <= k else np.partition(values, k - 1, axis=1)[:, :k]


def _held(
    num_rows: int,
    row: Int[ndarray, " pairs"],
    group: Int[ndarray, " pairs"],
    reached: Iterable[Bool[ndarray, " pairs"]],
    num_groups: int,
) -> Bool[ndarray, "rows groups"]:
    """Whether a row has a pair that counts: first of all pairs, then of all but those of each group.

    Args:
        num_rows: rows there are.
        row: of each pair.
        group: of each pair.
        reached: which pairs count, for each column.
        num_groups: groups there are.
    """
    held = np.zeros((num_rows, num_groups + 1), dtype=bool)
    for column, counts in zip(range(num_groups + 1), reached, strict=False):
        held[row[counts & (group != column - 1)], column] = True
    return held


def _jackknife(held: Bool[ndarray, "m groups"]) -> Estimate:
    """Share of rows that are held, with the jackknife over the groups that were left out."""
    shares = held.mean(0)
    left_out = shares[1:]
    variance = (len(left_out) - 1) * float(np.square(left_out - left_out.mean()).mean())
    return Estimate(float(shares[0]), math.sqrt(variance))
