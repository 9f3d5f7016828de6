"""Which picture comes when: one endless sequence of a split's rows, the same for any number of workers.

An epoch is a permutation of all rows. Row groups come in a random order, and so do the rows of each; what comes out is cut into
*lanes* of equal length, and every batch takes as many rows from each lane, so that it mixes as many groups as there are lanes:

    lane 0: g7 g2 g4   ->   places 0 1 | 4 5 | ...    of 2 lanes a batch of 4 takes 2 rows each;
    lane 1: g0 g5 g1   ->   places 2 3 | 6 7 | ...    worker 0 of 2 gets places 0 1, worker 1 gets 2 3

Epoch follows epoch without a gap. Batch k is places k B to (k + 1) B of the sequence, of which worker r of n takes the r-th n-th:
so what has been seen after any batch is the same for every n, a worker reads few groups at a time, and the position of a run is
one number, the pictures seen. All is a function of seed, batch size and the sizes of the groups. Called by `loader`.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_LANES = 16
"""Row groups that a batch mixes. As many are held in memory by a single worker, and n workers hold an n-th each and about one."""

_ORDER, _DRAWS = 0, 1
"""Keep the streams of random numbers apart."""


class Order:
    """The sequence of a split.

    Args:
        group_sizes: Rows of each row group, each at least 1.
        seed: Of the run.
        batch_size: Pictures of a batch over all workers.
    """

    def __init__(self, group_sizes: Sequence[int], *, seed: int, batch_size: int) -> None:
        self.seed = seed
        self.sizes = np.asarray(group_sizes, dtype=np.int64)
        self.ends = np.cumsum(self.sizes)
        self.num_rows = int(self.ends[-1])
        self.num_lanes = max(n for n in range(1, MAX_LANES + 1) if batch_size % n == 0)
        self.rows_per_lane = batch_size // self.num_lanes
        # What is read ahead may lie an epoch further than what is decoded.
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def take(self, first: int, count: int) -> NDArray[np.int64]:
        """A part of the sequence.

        Args:
            first: Place of its first row.
            count: Rows.

        Returns:
            [count, 3]: epoch, number of the row group, and row in the group.
        """
        places = np.arange(first, first + count)
        epochs, offsets = np.divmod(places, self.num_rows)
        rows = np.concatenate(
            [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        groups = np.searchsorted(self.ends, rows, side="right")
        return np.stack([epochs, groups, rows - (self.ends - self.sizes)[groups]], axis=1)

    def draws(self, epoch: int, group: int) -> NDArray[np.float64]:
        """A random number in [0, 1) for each row of a group, new in every epoch."""
        rng = np.random.default_rng((self.seed, _DRAWS, epoch, group))
        return rng.random(int(self.sizes[group]))

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """All rows in the order of an epoch, 8 bytes each."""
        rng = np.random.default_rng((self.seed, _ORDER, epoch))
        rows = np.concatenate(
            [
                rng.permutation(np.arange(self.ends[group] - self.sizes[group], self.ends[group]))
                for group in rng.permutation(len(self.sizes))
            ]
        )
        return _deal(np.array_split(rows, self.num_lanes), self.rows_per_lane)


def _deal(lanes: list[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
    """``count`` rows of each lane in turn until none is left; the first lane is the longest, by a row at most."""
    rounds = -(-len(lanes[0]) // count)
    table = np.full((len(lanes), rounds * count), -1)
    for line, lane in zip(table, lanes, strict=True):
        line[: len(lane)] = lane
    dealt = table.reshape(len(lanes), rounds, count).swapaxes(0, 1).ravel()
    return dealt[dealt >= 0]
