"""Charts as SVG in a page or a file: lines over the pictures seen, curves of points with intervals, areas that add up to a whole.

A chart is a figure of one fixed size that the page scales; a page holds many small ones rather than one with everything. Names
stand at the ends of their lines. Colours are classes, see `style`. Called by `curves` and `sweeps`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.axes import Axis, labels, linear_ticks, log_ticks
from pipelines.markup import Element, element, svg_file
from pipelines.style import file_style

WIDTH, HEIGHT = 420, 270

_TOP, _BOTTOM = 12, 38
_LINE = 14  # height of a name
_LETTER = 6.7  # width of a letter, about
_LONGEST = 20  # letters of a name
_CARD, _BETWEEN = 304, 14  # height of a chart with its title in a file, and room between two
_DOTTED = 12  # a line of so few points shows each of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart: arrays of one length."""

    name: str
    x: np.ndarray
    y: np.ndarray
    "NaN leaves a gap."
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    "What the line's points are means of lies between these; or the intervals of `points`, NaN where there is none."
    broken: np.ndarray = field(default_factory=lambda: np.empty(0))
    "Positions marked with a cross at the top: something there is not finite."
    color: str
    dashed: bool = False
    points: tuple[str, ...] = ()
    "Texts beside the points, maybe empty, as many; intervals are then bars through the points instead of a band."
    x_low: np.ndarray | None = None
    x_high: np.ndarray | None = None
    "Intervals of the points across."


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines over one axis."""

    title: str
    unit: str
    "Of the values, or what they are."
    lines: tuple[Line, ...]
    logarithmic: bool = False
    "Wanted; taken where all values are positive and differ by more than a factor of 3."
    from_zero: bool = False
    "Whether a linear axis begins at zero."
    x_title: str = "pictures seen"
    x_from_zero: bool = True
    "Whether the axis across begins at zero; else there is room at both of its ends."


def draw_lines(chart: Chart) -> Element:
    """A figure of a chart."""
    names = [line.name for line in chart.lines]
    right = _right(names)
    everything = [v for line in chart.lines for v in (line.y, line.low, line.high) if v is not None]
    y = _y_axis(np.concatenate(everything), chart)
    across = [v for line in chart.lines for v in (line.x, line.x_low, line.x_high) if v is not None]
    everywhere = np.concatenate(across)
    x = _x_axis(everywhere, chart.x_from_zero, _left(y), WIDTH - right)
    parts = [*_frame(x, y, chart.x_title)]
    for line in chart.lines:
        parts += _line(line, x, y)
    parts += _point_texts(chart.lines, x, y)
    parts += _names(names, [_end(line, y) for line in chart.lines], chart.lines, right)
    heading = " ".join(filter(None, (chart.title, chart.unit)))
    ends = "; ".join(f"{line.name} {_told(line.y)}".lstrip() for line in chart.lines)
    return figure(chart.title, chart.unit, f"{heading}: {ends}", parts)


def draw_file(charts: Sequence[Chart]) -> bytes:
    """A file of charts side by side, two a row."""
    columns = min(2, len(charts))
    parts: list[Element] = []
    for number, chart in enumerate(charts):
        row, column = divmod(number, columns)
        figure = draw_lines(chart)
        drawing = figure.find("svg")
        assert drawing is not None
        heading = element("text", chart.title, x=10, y=22, font_weight="bold", font_size="14")
        unit = element("tspan", chart.unit, dx=8, class_="faint small", font_weight="normal")
        heading.append(unit)
        frame = element(
            "rect", class_="card", x=0.5, y=0.5, width=WIDTH - 1, height=_CARD - 1, rx=8
        )
        inside = element("g", *drawing, transform=f"translate(0,{_CARD - HEIGHT})")
        place = f"translate({column * (WIDTH + _BETWEEN)},{row * (_CARD + _BETWEEN)})"
        parts.append(element("g", frame, heading, inside, transform=place))
    rows = -(-len(charts) // columns)
    size = (columns * (WIDTH + _BETWEEN) - _BETWEEN, rows * (_CARD + _BETWEEN) - _BETWEEN)
    return svg_file(*size, file_style(), *parts)


def draw_shares(title: str, unit: str, lines: Sequence[Line]) -> Element:
    """A figure of areas upon each other, whose values add up to 100; the first lies at the bottom."""
    x, names = lines[0].x, [line.name for line in lines]
    right = _right(names)
    y = Axis(0, 100, HEIGHT - _BOTTOM, _TOP, (0, 25, 50, 75, 100))
    across = _x_axis(x, True, _left(y), WIDTH - right)
    parts = [*_frame(across, y, "pictures seen")]
    below, middles = np.zeros(len(x)), []
    for line in lines:
        above = below + line.y
        # One line of the log is a rectangle.
        ends, low, high = (
            (np.r_[0.0, x], np.r_[below, below], np.r_[above, above])
            if len(x) == 1
            else (x, below, above)
        )
        shape = _outline(ends, low, high, across, y)
        parts.append(element("path", class_=f"area fill {line.color}", d=shape))
        middles.append(float(y.place((below[-1] + above[-1]) / 2)))
        below = above
    parts += _names(names, middles, lines, right)
    return figure(title, unit, f"{title}: {', '.join(names)}", parts)


def figure(
    title: str,
    unit: str,
    told: str,
    parts: Sequence[Element],
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Element:
    """A drawing under its title.

    Args:
        title: what is drawn.
        unit: of its numbers, or another word beside the title.
        told: all of it, for who does not see.
        parts: what the drawing consists of.
        size: its width and height.
    """
    drawing = element(
        "svg",
        element("title", told),
        *parts,
        viewBox=f"0 0 {size[0]} {size[1]}",
        role="img",
        aria_label=told,
    )
    caption = element("figcaption", element("b", title), " ", element("span", unit))
    return element("figure", caption, drawing, class_="chart")


def _frame(x: Axis, y: Axis, x_title: str) -> Iterator[Element]:
    """Rules, ticks and the axis' title."""
    for value, text in zip(y.ticks, labels(y.ticks), strict=True):
        place = _pixel(y.place(value))
        yield element("path", class_="rule", d=f"M{x.begin:g},{place}H{x.end:g}")
        yield element(
            "text", text, class_="faint", x=x.begin - 6, y=place, dy=".35em", text_anchor="end"
        )
    bottom = HEIGHT - _BOTTOM
    for value, text in zip(x.ticks, labels(x.ticks), strict=True):
        place = _pixel(x.place(value))
        yield element("path", class_="rule", d=f"M{place},{bottom}v4")
        yield element("text", text, class_="faint", x=place, y=bottom + 16, text_anchor="middle")
    middle = (x.begin + x.end) / 2
    yield element(
        "text", x_title, class_="faint", x=_pixel(middle), y=HEIGHT - 6, text_anchor="middle"
    )


def _line(line: Line, x: Axis, y: Axis) -> Iterator[Element]:
    across, up = x.place(line.x), y.place(line.y)
    seen = np.isfinite(up)
    if line.points:
        ends = (_points(*bar.T) for bar in _bars(line, x, y))
        if bars := "".join(f"M{begin}L{end}" for begin, end in ends):
            yield element("path", class_=f"bars {line.color}", d=bars)
    elif line.low is not None and line.high is not None:
        for run in _runs(seen):
            if len(run) > 1:
                low, high = (np.asarray(v)[run] for v in (line.low, line.high))
                shape = _outline(line.x[run], low, high, x, y)
                yield element("path", class_=f"band fill {line.color}", d=shape)
    # A point between two gaps is a line of no length, which its round ends make a dot.
    path = "".join(
        "M" + "L".join(_points(across[run], up[run])) + ("h0" if len(run) == 1 else "")
        for run in _runs(seen)
    )
    if path:
        dashed = " dashed" * line.dashed
        yield element("path", class_=f"line {line.color}{dashed}", d=path)
    if line.points or seen.sum() <= _DOTTED:
        dots = "".join(f"M{point}h0" for point in _points(across[seen], up[seen]))
        yield element("path", class_=f"dots {line.color}", d=dots)
    crosses = "".join(f"M{p - 3:.1f},{_TOP - 3}l6,6m0,-6l-6,6" for p in x.place(line.broken))
    if crosses:
        yield element("path", class_="broken", d=crosses)


def _bars(line: Line, x: Axis, y: Axis) -> np.ndarray:
    """The points' intervals that are known, up and then across: pixels of both ends, [bars, 2, 2]."""
    n = len(line.x)
    ends = np.full((2 * n, 2, 2), np.nan)
    if line.low is not None and line.high is not None:
        ends[:n, :, 0] = x.place(line.x)[:, None]
        ends[:n, :, 1] = y.place(np.stack([line.low, line.high], 1))
    if line.x_low is not None and line.x_high is not None:
        ends[n:, :, 0] = x.place(np.stack([line.x_low, line.x_high], 1))
        ends[n:, :, 1] = y.place(line.y)[:, None]
    known: np.ndarray = ends[np.isfinite(ends).all((1, 2))]
    return known


def _point_texts(lines: Sequence[Line], x: Axis, y: Axis) -> Iterator[Element]:
    """Texts beside points, each on the side of its point where it covers the least of what is drawn."""
    places = [np.stack([x.place(line.x), y.place(line.y)], 1) for line in lines]
    ways = [
        *(place for line, place in zip(lines, places, strict=True) if line.points),
        *(bar for line in lines if line.points for bar in _bars(line, x, y)),
    ]
    taken = np.concatenate([*map(_along, ways), np.empty((0, 2))])
    for line, place in zip(lines, places, strict=True):
        for text, point in zip(line.points, place, strict=False):
            if not text or not np.isfinite(point).all():
                continue
            half = 0.43 * _LETTER * len(text)
            spots = point + _AROUND * (7 + half, 11)
            off = np.abs(taken - spots[:, None])
            covered = ((off[..., 0] < half + 3) & (off[..., 1] < 7)).sum(1)
            across, up = spots.T
            inside = (x.begin <= across - half) & (across + half <= WIDTH)
            inside &= (y.end <= up) & (up <= y.begin)
            spot = spots[np.argmin(covered + 100 * ~inside)]
            taken = np.concatenate([taken, spot + np.linspace(-half, half, 5)[:, None] * (1, 0)])
            where = {"x": _pixel(spot[0]), "y": _pixel(spot[1]), "dy": ".35em"}
            yield element("text", text, class_="faint small", text_anchor="middle", **where)


_AROUND = np.array([(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)])
"""Sides of a point, the right one first."""


def _along(points: np.ndarray) -> np.ndarray:
    """Points on the way from each to the next, some pixels apart."""
    seen = points[np.isfinite(points).all(1)]
    ways = [
        np.linspace(a, b, 2 + int(np.abs(b - a).max() // 5)) for a, b in itertools.pairwise(seen)
    ]
    return np.concatenate([seen, *ways])


def _outline(x: np.ndarray, low: np.ndarray, high: np.ndarray, across: Axis, up: Axis) -> str:
    """Path around what lies between two lines."""
    there = _points(across.place(x), up.place(high))
    back = _points(across.place(x), up.place(low))[::-1]
    return "M" + "L".join([*there, *back]) + "Z"


def _points(x: np.ndarray, y: np.ndarray) -> list[str]:
    return [f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _runs(seen: np.ndarray) -> list[np.ndarray]:
    """Indices of what is seen, in parts without a gap."""
    where = np.flatnonzero(seen)
    return np.split(where, np.flatnonzero(np.diff(where) > 1) + 1) if len(where) else []


def _names(
    names: Sequence[str], wanted: Sequence[float], lines: Sequence[Line], right: float
) -> Iterator[Element]:
    """Names at the right, each by its line's end or as near as the others let it."""
    places = spread(wanted, _LINE, _TOP + 4, HEIGHT - _BOTTOM)
    begin = WIDTH - right
    for name, line, end, place in zip(names, lines, wanted, places, strict=True):
        if not name:
            continue
        lead = f"M{begin + 2:g},{end:.1f}L{begin + 10:g},{place:.1f}h6"
        yield element("path", class_=f"line {line.color}" + " dashed" * line.dashed, d=lead)
        yield element("text", _cut(name), x=begin + 20, y=f"{place:.1f}", dy=".35em")


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Places in the order of the wanted ones, a distance apart and between two bounds, where so many have room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    least = low
    for i in order:
        places[i] = least = max(wanted[i], least)
        least += distance
    most = high
    for i in reversed(order):
        places[i] = most = min(places[i], most)
        most -= distance
    return places


def _end(line: Line, y: Axis) -> float:
    """Where the last finite point lies."""
    seen = line.y[np.isfinite(line.y)]
    return float(y.place(seen[-1])) if len(seen) else float(_TOP + 4)


def _left(y: Axis) -> float:
    """Room at the left."""
    return max(46.0, 14 + _LETTER * max(map(len, labels(y.ticks)), default=0))


def _right(names: Sequence[str]) -> float:
    """Room at the right."""
    longest = max(len(_cut(name)) for name in names)
    return 26 + _LETTER * longest if longest else 14


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _told(values: np.ndarray) -> str:
    seen = values[np.isfinite(values)]
    return f"from {seen[0]:.4g} to {seen[-1]:.4g}" if len(seen) else "without a finite value"


def _x_axis(values: np.ndarray, from_zero: bool, begin: float, end: float) -> Axis:
    seen = values[np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    if not from_zero:
        room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    low = min(0.0, low) if from_zero else low
    high = high if high > low else low + 1.0
    return Axis(low, high, begin, end, tuple(linear_ticks(low, high, 5)))


def _y_axis(values: np.ndarray, chart: Chart) -> Axis:
    seen = values[np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    begin, end = HEIGHT - _BOTTOM, _TOP
    if chart.logarithmic and 0 < 3 * low < high:
        room = (high / low) ** 0.04
        low, high = low / room, high * room
        return Axis(low, high, begin, end, tuple(log_ticks(low, high)), logarithmic=True)
    if chart.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    largest = max(abs(low), abs(high))
    varies = high - low > 1e-9 * largest  # finer than that no axis can tell
    room = 0.05 * (high - low) if varies else 0.05 * largest or 1.0
    high += room
    low -= 0.0 if chart.from_zero and low == 0 else room
    return Axis(low, high, begin, end, tuple(linear_ticks(low, high, 5)))


def _pixel(value: np.ndarray | float) -> str:
    return f"{float(value):.1f}"
