"""Axes are round, names do not lie on each other, and every point is drawn where it belongs."""

import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from pipelines.axes import labels, linear_ticks, log_ticks, short
from pipelines.charts import HEIGHT, WIDTH, Chart, Line, draw_file, draw_lines, draw_shares, spread


def line(y, **fields) -> Line:
    y = np.asarray(y, dtype=float)
    return Line(
        **{"name": "a", "x": np.arange(1.0, len(y) + 1), "y": y, "color": "kind-0"} | fields
    )


def chart(*lines: Line, **fields) -> Chart:
    return Chart(**{"title": "Loss", "unit": "", "lines": lines} | fields)


def paths(figure, kind: str) -> list[str]:
    return [p.attrib["d"] for p in figure.iter("path") if kind in p.attrib["class"].split()]


def drawn(figure) -> list[tuple[float, float]]:
    """Points of the first line."""
    found = re.findall(r"(-?[\d.]+),(-?[\d.]+)", paths(figure, "line")[0])
    return [(float(x), float(y)) for x, y in found]


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_evenly_apart_and_inside(low, size) -> None:
    ticks = linear_ticks(low, low + size, 5)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-6 * size <= tick <= low + size * (1 + 1e-6) for tick in ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


@given(low=st.floats(1e-12, 1e6), ratio=st.floats(3, 1e15))
def test_logarithmic_ticks_are_few_and_inside(low, ratio) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= low * ratio for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (20480, "20.48k"), (1.5e6, "1.5M"), (8e9, "8G"), (999, "999")],
)
def test_short_numbers(value, text) -> None:
    assert short(value) == text


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-3, 1e9))
def test_labels_tell_ticks_apart(low, size) -> None:
    texts = labels(linear_ticks(low, low + size, 5))
    assert len(set(texts)) == len(texts)


def test_labels_are_not_cut_off_at_the_left() -> None:
    figure = draw_lines(chart(line([123456.0, 123457.0])))
    ends = [t for t in figure.iter("text") if t.attrib.get("text-anchor") == "end"]
    assert len({t.text for t in ends}) == len(ends) >= 3
    assert all(float(t.attrib["x"]) >= 6.5 * len(t.text or "") for t in ends)


def test_short_numbers_have_a_real_minus() -> None:
    assert short(2e-5) == "2e\N{MINUS SIGN}5"
    assert short(-7) == "\N{MINUS SIGN}7"


@given(wanted=st.lists(st.floats(10, 200), max_size=12))
def test_names_keep_their_distance_and_order(wanted) -> None:
    places = spread(wanted, 14, 10, 200)
    assert all(10 - 1e-6 <= place <= 200 for place in places)
    assert all(b - a >= 14 - 1e-6 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.array(places)[order]) > 0)


def test_a_greater_value_lies_higher_and_a_later_one_further_right() -> None:
    points = drawn(draw_lines(chart(line([1.0, 2.0, 4.0]))))
    (x, y) = zip(*points, strict=True)
    assert list(x) == sorted(x)
    assert list(y) == sorted(y, reverse=True)
    assert y[1] - y[2] == pytest.approx(2 * (y[0] - y[1]), abs=0.2)


def test_on_a_logarithmic_axis_equal_ratios_are_equally_far() -> None:
    y = [y for _, y in drawn(draw_lines(chart(line([1.0, 10.0, 100.0]), logarithmic=True)))]
    assert y[1] - y[2] == pytest.approx(y[0] - y[1], abs=0.2)


def test_a_logarithmic_axis_is_taken_for_positive_values_only() -> None:
    y = [y for _, y in drawn(draw_lines(chart(line([0.0, 50.0, 100.0]), logarithmic=True)))]
    assert y[1] - y[2] == pytest.approx(y[0] - y[1], abs=0.2)


def test_a_gap_is_not_bridged_and_a_lone_point_is_seen() -> None:
    figure = draw_lines(chart(line([1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0])))
    first = paths(figure, "line")[0]
    assert first.count("M") == 3
    assert first.count("h0") == 1


def test_what_is_not_finite_is_marked() -> None:
    figure = draw_lines(chart(line([1.0, math.nan], broken=np.array([2.0]))))
    assert len(paths(figure, "broken")) == 1
    assert not paths(draw_lines(chart(line([1.0, 2.0]))), "broken")


@given(y=st.lists(st.floats(width=32), min_size=1, max_size=30), logarithmic=st.booleans())
def test_everything_is_drawn_inside_whatever_the_values(y, logarithmic) -> None:
    assume(any(map(math.isfinite, y)))
    values = np.where(np.isfinite(y), y, np.nan)
    figure = draw_lines(chart(line(values, low=values, high=values), logarithmic=logarithmic))
    for path in figure.iter("path"):
        assert "nan" not in path.attrib["d"]
        assert "inf" not in path.attrib["d"]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn(figure))


def test_a_line_without_a_finite_value_is_told() -> None:
    figure = draw_lines(chart(line([math.nan])))
    svg = figure.find("svg")
    assert svg is not None
    assert "without a finite value" in svg.attrib["aria-label"]


@pytest.mark.parametrize("size", [1, 2, 50])
def test_areas_lie_upon_each_other_up_to_the_top(size) -> None:
    parts = [line([25] * size, name="a"), line([75] * size, name="b")]
    heights = []
    for shape in paths(draw_shares("Time", "", parts), "area"):
        y = [float(value) for _, value in re.findall(r"([\d.]+),([\d.]+)", shape)]
        heights.append((min(y), max(y)))
    (top, middle), (bottom_top, bottom) = heights[1], heights[0]
    assert middle == bottom_top
    assert (bottom - middle) / (bottom - top) == pytest.approx(0.25, abs=0.01)


def points(n: int, spread: float, texts: bool = True) -> Line:
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n))
    names = tuple(str(i) for i in range(n)) if texts else ("",) * n
    ends = {"low": y - spread, "high": y + spread, "x_low": x - spread, "x_high": x + spread}
    return line(y, x=x, points=names, **ends)


@given(n=st.integers(1, 12), spread=st.floats(0, 5))
def test_intervals_go_through_their_points_and_stay_inside(n, spread) -> None:
    figure = draw_lines(chart(points(n, spread), x_from_zero=False))
    bars = re.findall(r"M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)", paths(figure, "bars")[0])
    assert len(bars) == 2 * n
    for number, bar in enumerate(bars):
        x0, y0, x1, y1 = map(float, bar)
        assert 0 <= x0 <= x1 <= WIDTH
        assert 0 <= y1 <= y0 <= HEIGHT
        across, up = drawn(figure)[number % n]
        assert (x0 + x1) / 2 == pytest.approx(across, abs=0.11)
        assert (y0 + y1) / 2 == pytest.approx(up, abs=0.11)


def test_an_unknown_interval_has_no_bar() -> None:
    nan = np.array([math.nan, 0.5])
    figure = draw_lines(chart(line([1.0, 2.0], points=("a", "b"), low=nan, high=nan + 2)))
    assert paths(figure, "bars")[0].count("M") == 1
    figure = draw_lines(chart(line([1.0, 2.0], points=("a", "b"))))
    assert not paths(figure, "bars")


def test_texts_stand_by_their_points_and_not_on_each_other() -> None:
    figure = draw_lines(chart(points(9, 0.1), x_from_zero=False))
    texts = [t for t in figure.iter("text") if "small" in t.attrib.get("class", "")]
    places = np.array([(float(t.attrib["x"]), float(t.attrib["y"])) for t in texts])
    assert [t.text for t in texts] == [str(i) for i in range(9)]
    assert np.abs(places - drawn(figure)).max() < 20
    for number, place in enumerate(places):
        others = np.abs(np.delete(places, number, 0) - place)
        assert ((others[:, 0] > 6) | (others[:, 1] > 7)).all()
    assert not [
        t for t in draw_lines(chart(points(9, 0.1, texts=False))).iter("text") if not t.text
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_file_of_charts_is_a_drawing_by_itself(count) -> None:
    content = draw_file([chart(points(5, 0.1), title="<&>", unit="a")] * count)
    root = ET.fromstring(content)
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("<&>") == count
    style = root.findtext("{http://www.w3.org/2000/svg}style") or ""
    assert "var(" not in content.decode()
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"href|url\(|@import|<script", content.decode())
    resvg = pytest.importorskip("resvg_py")
    picture = bytes(resvg.svg_to_bytes(svg_string=content.decode()))
    with Image.open(io.BytesIO(picture)) as opened:
        pixels = np.asarray(opened.convert("RGB")).reshape(-1, 3)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        assert opened.size == (round(width), round(height))
    assert (pixels == (0x00, 0x72, 0xB2)).all(1).any()  # the line, in its colour on white
