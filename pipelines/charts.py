"""Charts as SVG inside a page: lines over the pictures seen, and areas that add up to a whole.

A chart is a figure of one fixed size that the page scales; a page holds many small ones rather than one with everything. Names
stand at the ends of their lines. Colours are classes, which `STYLE` gives values for light and dark surroundings: Okabe and Ito's
for kinds (https://jfly.uni-koeln.de/color/), viridis for what has an order. Called by `report`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.markup import Element, element

WIDTH, HEIGHT = 420, 270
NUM_COLORS = 8
"""Classes ``kind-0`` ... and ``order-0`` ..."""

_TOP, _BOTTOM = 12, 38
_LINE = 14  # height of a name
_LETTER = 6.7  # width of a letter, about
_LONGEST = 20  # letters of a name
_DOTTED = 12  # a line of so few points shows each of them

_PALETTES = {
    "kind": (
        ("#0072b2", "#d55e00", "#00805e", "#b0558a", "#a87400", "#2b8fc4", "#5b5b66", "#7a4fd0"),
        ("#4aa8e8", "#ff8a3d", "#2fc79b", "#e693c4", "#f0b429", "#8fd3ff", "#b9b9c6", "#b79bff"),
    ),
    "order": (
        ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#3fa85b", "#7fa51e", "#b59a00"),
        ("#9a6ff0", "#7c8cf2", "#5aa5e6", "#3cbccb", "#35cfa5", "#66db7d", "#a8e04f", "#f5e626"),
    ),
}
"""Of lines on white, and on black."""

STYLE = """
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .faint { fill: var(--faint); }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .dots { fill: none; stroke-width: 5; stroke-linecap: round; }
svg .dashed { stroke-dasharray: 5 4; }
svg .band { stroke: none; opacity: .18; }
svg .area { stroke: var(--card); stroke-width: .7; opacity: .9; }
svg .broken { stroke: var(--bad); stroke-width: 1.6; fill: none; }
"""


def palette(dark: bool) -> str:
    """CSS variables ``--kind-0`` ... of the colours."""
    return "".join(
        f"--{name}-{number}: {color}; "
        for name, both in _PALETTES.items()
        for number, color in enumerate(both[dark])
    )


def color_classes() -> str:
    """CSS rules that give lines and areas their colours."""
    names = [f"{name}-{number}" for name in _PALETTES for number in range(NUM_COLORS)]
    return "\n".join(
        f"svg .{name} {{ stroke: var(--{name}); }} svg .{name}.fill {{ fill: var(--{name}); }}"
        for name in names
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart: arrays of one length."""

    name: str
    x: np.ndarray
    y: np.ndarray
    "NaN leaves a gap."
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    "What the line's points are means of lies between these."
    broken: np.ndarray = field(default_factory=lambda: np.empty(0))
    "Positions marked with a cross at the top: something there is not finite."
    color: str
    dashed: bool = False


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


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values lie in a picture."""

    low: float
    high: float
    begin: float
    "Pixel of `low`."
    end: float
    "Pixel of `high`."
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Pixels of values."""
        low, high = self.low, self.high
        found = np.asarray(values, dtype=np.float64)
        if self.logarithmic:
            low, high, found = math.log(low), math.log(high), np.log(found)
        return np.asarray(self.begin + (found - low) / (high - low) * (self.end - self.begin))


def draw_lines(chart: Chart) -> Element:
    """A figure of a chart."""
    names = [line.name for line in chart.lines]
    right = _right(names)
    everything = [v for line in chart.lines for v in (line.y, line.low, line.high) if v is not None]
    y = _y_axis(np.concatenate(everything), chart)
    everywhere = np.concatenate([line.x for line in chart.lines])
    x = _x_axis(everywhere, chart.x_from_zero, _left(y), WIDTH - right)
    parts = [*_frame(x, y, chart.x_title)]
    for line in chart.lines:
        parts += _line(line, x, y)
    parts += _names(names, [_end(line, y) for line in chart.lines], chart.lines, right)
    heading = " ".join(filter(None, (chart.title, chart.unit)))
    ends = "; ".join(f"{line.name} {_told(line.y)}".lstrip() for line in chart.lines)
    return _figure(chart.title, chart.unit, f"{heading}: {ends}", parts)


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
    return _figure(title, unit, f"{title}: {', '.join(names)}", parts)


def _figure(title: str, unit: str, told: str, parts: Sequence[Element]) -> Element:
    drawing = element(
        "svg",
        element("title", told),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
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
    if line.low is not None and line.high is not None:
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
    if seen.sum() <= _DOTTED:
        dots = "".join(f"M{point}h0" for point in _points(across[seen], up[seen]))
        yield element("path", class_=f"dots {line.color}", d=dots)
    crosses = "".join(f"M{p - 3:.1f},{_TOP - 3}l6,6m0,-6l-6,6" for p in x.place(line.broken))
    if crosses:
        yield element("path", class_="broken", d=crosses)


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
    low, high = float(values.min()), float(values.max())
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


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between two others: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive others: powers of ten, and multiples of them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        values = [float(f"{m}e{power}") for power in powers for m in multiples]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: 1 + len(ticks) // 9]


def labels(ticks: Sequence[float]) -> list[str]:
    """Texts of ticks, with as many digits as it takes to tell them apart."""
    texts: list[str] = []
    for digits in range(4, 16):
        texts = [short(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def short(value: float, digits: int = 4) -> str:
    """A number for an axis: 20k, 1.5M, 0.05, 2e-5."""
    size, suffix = abs(value), ""
    if size >= 1e15 or 0 < size < 1e-3:
        number, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        value, suffix = float(number), f"e{int(exponent)}"
    else:
        for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= factor:
                value, suffix = value / factor, letter
                break
    return f"{value:.{digits}g}{suffix}".replace("-", "\N{MINUS SIGN}")


def _pixel(value: np.ndarray | float) -> str:
    return f"{float(value):.1f}"
