"""A log becomes columns, whatever happened to it, and thinning keeps means, extremes and ends."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.history import Column, parse, shares, thin

VALUES = st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=200)


def column(y, x=None) -> Column:
    made = Column()
    made.x.extend(range(1, len(y) + 1) if x is None else x)
    made.y.extend(y)
    return made


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@given(y=VALUES, limit=st.integers(3, 40))
def test_thinning_keeps_means_extremes_and_ends(y, limit) -> None:
    curve = thin(column(y), limit)
    found, seen = np.array(y), np.isfinite(y)
    assert len(curve.x) == min(len(y), limit)
    assert np.all(np.diff(curve.x) > 0)
    assert curve.counts.sum() == seen.sum()
    filled = curve.counts > 0
    assert np.isnan(curve.y[~filled]).all()
    total = math.fsum(found[seen])
    scale = np.abs(found[seen]).sum()
    assert math.fsum(curve.y[filled] * curve.counts[filled]) == pytest.approx(
        total, abs=1e-9 * scale + 1e-300
    )
    if seen.any():
        assert np.nanmin(curve.low) == found[seen].min()
        assert np.nanmax(curve.high) == found[seen].max()
    for end in (0, -1):
        assert curve.x[end] == (1 if end == 0 else len(y))
        assert curve.y[end] == found[end] if seen[end] else math.isnan(curve.y[end])
    assert bool(len(curve.broken)) == (not seen.all())


def test_a_short_column_is_not_thinned() -> None:
    curve = thin(column([3.0, 1.0, 2.0]))
    assert curve.y.tolist() == curve.low.tolist() == curve.high.tolist() == [3.0, 1.0, 2.0]


def test_columns_are_of_numbers_and_texts_are_kept() -> None:
    history = parse(lines({"images": 1, "a": 2, "b": "x", "c": None}, {"images": 2, "b": [1]}))
    assert {key: column.y.tolist() for key, column in history.columns.items()} == {"a": [2.0]}
    assert history.texts == {"b": "[1]", "c": "null"}
    assert history.positions.tolist() == [1, 2]


def test_a_cut_last_line_is_skipped_and_others_are_counted() -> None:
    whole = lines({"images": 1, "a": 1}, {"images": 2, "a": 2})
    cut = parse(whole + '{"images": 3, "a"')
    assert (cut.positions.tolist(), cut.num_unreadable) == ([1, 2], 0)
    damaged = parse('{"images\n[]\n{"a": 1}\n{"images": NaN}\n{"images": null}\n\n' + whole)
    assert (damaged.positions.tolist(), damaged.num_unreadable) == ([1, 2], 5)


def test_what_was_logged_anew_replaces_what_was_logged_before() -> None:
    text = lines(
        {"images": 1, "a": 1},
        {"images": 2, "a": 2, "b": 2},
        {"images": 3, "b": 3},
        {"images": 2, "a": 9},
    )
    history = parse(text)
    assert history.positions.tolist() == [1, 2]
    assert {key: column.y.tolist() for key, column in history.columns.items()} == {"a": [1.0, 9.0]}


def test_numbers_without_bound_are_infinite() -> None:
    history = parse('{"images": 1, "a": 1e999, "b": -' + "9" * 400 + ', "c": NaN}')
    a, b, c = (history.columns[key].y[0] for key in "abc")
    assert (a, b) == (math.inf, -math.inf)
    assert math.isnan(c)


def test_shares_add_up_to_one_wherever_something_was_logged() -> None:
    first = column([1.0, 3.0, math.nan], x=[1, 2, 3])
    second = column([1.0, 2.0, 0.0], x=[2, 3, 4])
    found = shares([first, second])
    assert found[0].x.tolist() == found[1].x.tolist() == [1, 2, 3]
    assert found[0].y.tolist() == [1.0, 0.75, 0.0]
    assert found[1].y.tolist() == [0.0, 0.25, 1.0]
    assert shares([]) == []
