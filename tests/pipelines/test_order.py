"""The sequence of training pictures: every picture once an epoch, whoever reads it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import Order

SIZES = [5 + k % 3 for k in range(11)]
NUM_ROWS = sum(SIZES)

sizes_of_groups = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def _order(sizes=SIZES, *, seed=0, batch_size=12) -> Order:
    return Order(sizes, seed=seed, batch_size=batch_size)


def _rows(order: Order, first: int, count: int) -> list[tuple[int, ...]]:
    """Group and row, without the epoch."""
    return [tuple(row) for row in order.take(first, count)[:, 1:].tolist()]


def _all_rows(sizes) -> list[tuple[int, int]]:
    return [(group, row) for group, size in enumerate(sizes) for row in range(size)]


@given(sizes=sizes_of_groups, batch_size=st.integers(1, 70), epoch=st.integers(0, 3))
def test_an_epoch_is_every_row_once(sizes, batch_size: int, epoch: int) -> None:
    order = _order(sizes, batch_size=batch_size)
    taken = order.take(epoch * order.num_rows, order.num_rows)
    assert set(taken[:, 0].tolist()) == {epoch}
    assert sorted(map(tuple, taken[:, 1:].tolist())) == _all_rows(sizes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_workers_together_see_every_picture_once_an_epoch(world_size: int) -> None:
    """Also where neither the batch nor the workers divide the epoch: 65 rows here."""
    order = _order()
    local = order.rows_per_lane * order.num_lanes // world_size
    steps = 3 * NUM_ROWS // 12 + 1
    seen = [
        tuple(row)
        for step in range(steps)
        for rank in range(world_size)
        for row in order.take(step * 12 + rank * local, local).tolist()
    ]
    for epoch in range(3):
        rows = [(group, row) for e, group, row in seen if e == epoch]
        assert sorted(rows) == _all_rows(SIZES)


@given(
    sizes=sizes_of_groups,
    first=st.integers(0, 200),
    parts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 5)), min_size=1, max_size=4
    ),
)
def test_stopping_and_going_on_with_any_number_of_workers_changes_nothing(
    sizes, first: int, parts
) -> None:
    whole = _order(sizes)
    position, seen = first, []
    for world_size, steps in parts:
        order = _order(sizes)  # as a new process makes it
        for _ in range(steps):
            for rank in range(world_size):
                share = 12 // world_size
                seen += order.take(position + rank * share, share).tolist()
            position += 12
    assert seen == whole.take(first, position - first).tolist()


def test_a_seed_gives_one_order_and_epochs_differ() -> None:
    one, again, other = _order(), _order(), _order(seed=1)
    first = _rows(one, 0, NUM_ROWS)
    assert first == _rows(again, 0, NUM_ROWS)
    assert first != _rows(other, 0, NUM_ROWS)
    assert first != _rows(one, NUM_ROWS, NUM_ROWS)
    assert not np.array_equal(one.draws(0, 3), one.draws(1, 3))
    assert np.array_equal(one.draws(1, 3), again.draws(1, 3))


def test_a_batch_mixes_groups_and_a_worker_reads_few() -> None:
    order = _order([256] * 100, batch_size=64)
    assert order.num_lanes == 16
    for step in range(5):
        assert len(set(order.take(step * 64, 64)[:, 1].tolist())) == 16
    steps = order.num_rows // 64
    for world_size in (2, 4, 8, 16):
        local = 64 // world_size
        reads = 0
        for rank in range(world_size):
            mine = [order.take(step * 64 + rank * local, local)[:, 1] for step in range(steps)]
            reads += len(set(np.concatenate(mine).tolist()))
        assert reads <= 100 + 16  # a group on the border of two lanes is read twice


@pytest.mark.parametrize(("batch_size", "lanes"), [(32, 16), (20, 10), (37, 1), (1, 1), (3, 3)])
def test_lanes_divide_the_batch(batch_size: int, lanes: int) -> None:
    assert _order(batch_size=batch_size).num_lanes == lanes
