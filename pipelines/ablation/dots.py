"""A chart of cells: a row each, a dot for each seed, a bar for their mean.

Called by `story`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.axes import Axis, labels, linear_ticks
from pipelines.charts import figure
from pipelines.markup import Element, element, svg_file
from pipelines.style import file_style

WIDTH = 560
_ROW, _TOP, _BOTTOM = 22, 10, 40
_LETTER, _LONGEST = 6.7, 34


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """A chart."""

    title: str
    "What is measured."
    unit: str
    "Which way is better, or the like."
    cells: Mapping[str, Sequence[float]]
    "Name -> numbers, one a seed; rows from top to bottom."
    baseline: str
    "The cell at whose mean a line runs through all rows."


def draw_dots(chart: Dots) -> Element:
    """A figure."""
    body, height = _body(chart.cells, chart.baseline)
    means = "; ".join(
        f"{name} {np.mean(values):.4g}" for name, values in chart.cells.items() if values
    )
    told = f"{chart.title} {chart.unit}, means: {means}"
    return figure(chart.title, chart.unit, told, body, (WIDTH, height))


def dots_file(charts: Sequence[Dots]) -> bytes:
    """A file of charts, one below the other."""
    parts, top = [], 0
    for chart in charts:
        body, height = _body(chart.cells, chart.baseline)
        heading = element("text", chart.title, x=10, y=20, font_weight="bold", font_size="14")
        unit = element("tspan", chart.unit, dx=8, class_="faint small", font_weight="normal")
        heading.append(unit)
        frame = element(
            "rect", class_="card", x=0.5, y=0.5, width=WIDTH - 1, height=height + 29, rx=8
        )
        inside = element("g", *body, transform="translate(0,30)")
        parts.append(element("g", frame, heading, inside, transform=f"translate(0,{top})"))
        top += height + 44
    return svg_file(WIDTH, top - 14, file_style(), *parts)


def _body(cells: Mapping[str, Sequence[float]], baseline: str) -> tuple[list[Element], int]:
    """What is drawn, and how high it is."""
    names = [_cut(name) for name in cells]
    left = 16 + _LETTER * max(map(len, names))
    bottom = _TOP + _ROW * len(cells)
    everything = np.array([value for values in cells.values() for value in values])
    axis = _axis(everything[np.isfinite(everything)], left)
    parts = []
    for value, text in zip(axis.ticks, labels(axis.ticks), strict=True):
        x = _pixel(axis, value)
        parts.append(element("path", class_="rule", d=f"M{x},{_TOP}V{bottom}"))
        parts.append(
            element("text", text, class_="faint", x=x, y=bottom + 18, text_anchor="middle")
        )
    if (base := list(cells.get(baseline, []))) and np.isfinite(base).any():
        x = _pixel(axis, float(np.nanmean(base)))
        parts.append(element("path", class_="line kind-6 dashed", d=f"M{x},{_TOP}V{bottom}"))
    for row, (name, values) in enumerate(zip(names, cells.values(), strict=True)):
        y = _TOP + _ROW * (row + 0.5)
        parts.append(
            element("text", name, x=left - 10, y=f"{y:.1f}", dy=".35em", text_anchor="end")
        )
        seen = [value for value in values if np.isfinite(value)]
        if not seen:
            continue
        mean = _pixel(axis, float(np.mean(seen)))
        parts.append(element("path", class_="line kind-1", d=f"M{mean},{y - 7:.1f}v14"))
        dots = "".join(f"M{_pixel(axis, value)},{y:.1f}h0" for value in seen)
        parts.append(element("path", class_="dots kind-0", d=dots))
    return parts, bottom + _BOTTOM - 12


def _axis(values: np.ndarray, left: float) -> Axis:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return Axis(low, high, left, WIDTH - 16, tuple(linear_ticks(low, high, 5)))


def _pixel(axis: Axis, value: float) -> str:
    return f"{float(axis.place(value)):.1f}"


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
