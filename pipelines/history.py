"""What a run has logged, as one column of numbers a key, and columns thinned for drawing.

A log of a week has a hundred thousand lines, a chart a few hundred pixels. A column is cut into buckets of equally many lines,
each of which becomes its mean, with the least and the greatest value beside it so that no spike is lost; the first and the last
line stay by themselves. Called by `report`.
"""

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

POSITION = "images"
"""Key of a line that says how many pictures had been seen."""

MAX_POINTS = 600
"""Of a thinned column."""


FLOAT32_MAX = float(np.finfo(np.float32).max)
"""What is greater counts as infinite, as it does in training."""


@dataclass(frozen=True, slots=True)
class Column:
    """What was logged under one key, in order of the position."""

    x: "array[float]" = field(default_factory=lambda: array("d"))
    "Pictures seen, increasing."
    y: "array[float]" = field(default_factory=lambda: array("d"))
    "Values; may be infinite or NaN."


@dataclass(frozen=True, slots=True)
class Curve:
    """A thinned column: arrays of one length."""

    x: np.ndarray
    y: np.ndarray
    "Means of the finite values of each bucket; NaN where there is none."
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    "Finite values of each bucket."
    broken: np.ndarray
    "Positions of the buckets that hold a value that is not finite."


@dataclass(frozen=True, slots=True)
class History:
    """A log of which every line counts that could be read."""

    columns: dict[str, Column]
    "Of numbers, by key, in the order in which the keys first appeared."
    texts: dict[str, str]
    "The last of what was logged under a key and is no number."
    positions: "array[float]"
    "Pictures seen, of each line."
    num_unreadable: int
    "Lines that are not JSON objects with a position, a last one that was cut not among them."


def parse(text: str) -> History:
    """Reads ``metrics.jsonl``.

    A line at or before the position of an earlier one replaces it: a run went on from its checkpoint and logged anew.
    """
    history = _Reader()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.strip() and not history.add(line) and number < len(lines) - 1:
            history.num_unreadable += 1
    columns = {key: column for key, column in history.columns.items() if column.x}
    return History(columns, history.texts, history.positions, history.num_unreadable)


class _Reader:
    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.texts: dict[str, str] = {}
        self.positions = array("d")
        self.num_unreadable = 0

    def add(self, line: str) -> bool:
        """Takes in one line; False if it cannot be read."""
        try:
            values = json.loads(line)
            position = float(values[POSITION])
        except (ValueError, KeyError, TypeError, OverflowError):
            return False
        if not math.isfinite(position):
            return False
        if self.positions and self.positions[-1] >= position:
            self._go_back(position)
        self.positions.append(position)
        for key, value in values.items():
            if key == POSITION:
                continue
            number = _number(value)
            if number is None:
                self.texts[key] = value if isinstance(value, str) else json.dumps(value)
            else:
                column = self.columns.setdefault(key, Column())
                column.x.append(position)
                column.y.append(number)
        return True

    def _go_back(self, position: float) -> None:
        """Forgets what was logged from a position on."""
        _drop_from(position, self.positions)
        for column in self.columns.values():
            _drop_from(position, column.x, column.y)


def _drop_from(position: float, x: "array[float]", *others: "array[float]") -> None:
    while x and x[-1] >= position:
        for values in (x, *others):
            values.pop()


def _number(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    if abs(value) > FLOAT32_MAX:
        return math.inf if value > 0 else -math.inf
    return float(value)


def thin(column: Column, limit: int = MAX_POINTS) -> Curve:
    """A column of at most so many points.

    Args:
        column: with at least one value.
        limit: at least 3.
    """
    x, y = np.asarray(column.x), np.asarray(column.y)
    starts = _starts(len(x), limit)
    sizes = np.diff(starts, append=len(x))
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, y, 0.0), starts)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    empty = counts == 0
    low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    positions = np.add.reduceat(x, starts) / sizes
    return Curve(
        x=positions,
        y=means,
        low=np.where(empty, np.nan, low),
        high=np.where(empty, np.nan, high),
        counts=counts,
        broken=positions[counts < sizes],
    )


def _starts(size: int, limit: int) -> np.ndarray:
    """First lines of the buckets."""
    if size <= limit:
        return np.arange(size)
    between = np.linspace(1, size - 1, limit - 1).astype(np.int64)
    return np.concatenate([[0], between])


def shares(columns: Sequence[Column]) -> list[Column]:
    """Columns on common positions, in parts of their sum; what is missing or not finite is zero."""
    if not columns:
        return []
    common = np.unique(np.concatenate([np.asarray(column.x) for column in columns]))
    values = np.zeros((len(columns), len(common)))
    for row, column in zip(values, columns, strict=True):
        y = np.asarray(column.y)
        row[np.searchsorted(common, np.asarray(column.x))] = np.where(np.isfinite(y), y, 0.0)
    values = values.clip(min=0.0)
    total = values.sum(axis=0)
    kept = total > 0
    parts = values[:, kept] / total[kept]
    return [Column(array("d", common[kept]), array("d", row)) for row in parts]
