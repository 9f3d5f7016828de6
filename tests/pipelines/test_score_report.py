"""What is told of an evaluation: the paper's table, whatever a result holds or lacks, as text that nothing can break out of."""

import copy
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from pipelines import grid, score_report, score_tables, storage, sweeps
from pipelines.schema import RunDir

EVIL = "<script>alert(1)</script> | [x](http://evil.example) `"
SVG = "{http://www.w3.org/2000/svg}"


def entry(value, half=None, **more):
    ends = None if half is None else [value - half, value + half]
    return {"value": value, "standard_error": half and half / 1.96, "interval": ends} | more


def scores(distance, inception, prefix="_lite0"):
    fid = "fid" if prefix == "" else f"fd{prefix}"
    return {
        fid: entry(distance, 0.4),
        f"{fid}_infinity": entry(distance - 1, 0.6),
        f"precision{prefix}": entry(0.7, 0.02),
        f"is{prefix}": entry(inception, 0.2, deviation=0.11),
    }


@pytest.fixture
def result():
    """Everything that there can be."""
    sizes = {
        size: scores(fd, is_)
        | {"untrained": scores(fd + 250, 1.02), "reference": {"is_lite0": entry(9.5, 0.3)}}
        for size, fd, is_ in (("16", 12.345678, 5.4321), ("32", 55.5, 6.6))
    }
    nearest = [
        {
            "index": i,
            "caption": EVIL,
            "neighbours": [
                {"row": 10 * i + k, "caption": f"near {EVIL}", "distance": 1.5 + k} for k in (0, 1)
            ],
        }
        for i in (3, 8)
    ]
    return {
        "scores": sizes,
        "settings": {
            "num_images": 1000,
            "num_references": 300,
            "split": "val",
            "captions": EVIL,
            "sampler": "dpmpp_2m",
            "num_steps": 25,
            "guidance": 3.0,
            "extractor": "efficientnet_lite0",
        },
        "warnings": [f"beware {EVIL}"],
        "memorisation": {
            "resolution": 32,
            "num_training_images": 12000,
            "median_distance": 3.1,
            "median_distance_of_reference": 4.2,
            "nearest": nearest,
        },
        "sweep": [
            {
                "guidance": guidance,
                "num_steps": steps,
                "scores": {
                    size: {
                        "fd_lite0": entry(50 - 5 * guidance + 100 / steps, 1.0),
                        "is_lite0": entry(4 + guidance, 0.1),
                        "clip_score": entry(25 + guidance - 9 / steps, 0.1),
                    }
                    for size in ("16", "32")
                },
            }
            for steps in (25, 10)
            for guidance in (1.0, 3.0, 2.0)
        ],
    }


@pytest.fixture
def layout(tmp_path):
    layout = RunDir(str(tmp_path / "run"))
    for path in (layout.grid, layout.nearest):
        storage.write_atomically(path, grid.png_bytes(Image.new("RGB", (40, 20), "red")))
    return layout


def tables_of(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text as rows of cells."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        assert token.type != "html_block"
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level >= 4:
            assert {child.type for child in token.children} <= {"text", "text_special"}
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def body(page: bytes) -> ET.Element:
    """Of a page, whose elements are XML but for those without an end."""
    text = page.decode().partition("\n")[2]
    return ET.fromstring(re.sub(r"(<(?:img|meta)[^>]*)>", r"\1/>", text))


def cells(root: ET.Element) -> list[list[str]]:
    return [["".join(c.itertext()) for c in row] for row in root.iter("tr")]


def test_the_terminal_shows_the_papers_table_and_what_to_mind(result) -> None:
    text = score_report.table(result)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["resolution", "fd_lite0", "is_lite0"]
    assert re.fullmatch(r"16 px +12\.35 ± 0\.40 +5\.43 ± 0\.20", lines[2])
    assert re.fullmatch(r"32 px +55\.50 ± 0\.40 +6\.60 ± 0\.20", lines[3])
    assert "untrained network, 16 px" in text
    assert re.search(r"real pictures, 32 px +- +9\.50 ± 0\.30", text)
    assert "1,000 pictures drawn, 300 of val as reference" in text
    assert "beware" in text
    assert "35 at 16 px" not in text.split("Lowest")[0]
    assert "39 at 16 px (guidance 3, 25 steps)" in text


def test_all_that_is_there_is_in_the_markdown_file(result, layout) -> None:
    score_report.write_all(layout, result, command="layered evaluate --run `x`")
    text = storage.read_bytes(layout.evaluation_md).decode()
    found = tables_of(text)
    assert found[0] == [
        ["resolution", "fd_lite0", "is_lite0"],
        ["16 px", "12.35 (11.95 to 12.75)", "5.43 (5.23 to 5.63)"],
        ["32 px", "55.50 (55.10 to 55.90)", "6.60 (6.40 to 6.80)"],
    ]
    assert [row[0] for row in found[1][1:]] == [
        f"{kind}, {size} px" for kind in ("untrained network", "real pictures") for size in (16, 32)
    ]
    everything = {row[0]: row[1:] for row in found[2]}
    assert everything["precision_lite0"][0] == "0.700 (0.680 to 0.720)"
    assert everything["is_lite0, deviation"] == ["0.11", "0.11"]
    assert found[3][0] == ["guidance", "steps", "fd_lite0", "CLIP score", "is_lite0"]
    assert [row[:2] for row in found[3][1:4]] == [["1", "10"], ["2", "10"], ["3", "10"]]
    assert found[5][1] == ["3", EVIL, "30", f"near {EVIL}", "1.5"]
    settings = dict(found[6])
    assert settings["captions"] == EVIL
    for picture in ("grid.png", "sweep.svg", "nearest.png"):
        assert f"]({picture})" in text
        assert storage.exists(storage.join(layout.path, picture))
    assert "\n    layered evaluate --run `x`\n" in text
    assert "<script" not in text


def test_the_page_says_the_same_and_needs_nothing_else(result, layout) -> None:
    score_report.write_all(layout, result, command=EVIL)
    content = storage.read_bytes(layout.evaluation_html)
    root = body(content)
    text = content.decode()
    assert not re.search(r"https?://(?!evil)|@import|url\(|<script|<link", text)
    markdown_rows = [
        row
        for table in tables_of(storage.read_bytes(layout.evaluation_md).decode())
        for row in table
    ]
    assert cells(root) == markdown_rows
    assert all(image.attrib["src"].startswith("data:image/") for image in root.iter("img"))
    assert len(list(root.iter("img"))) == 2
    drawings = list(root.iter("svg"))
    assert [drawing.attrib["role"] for drawing in drawings] == ["img", "img"]
    assert [h.text for h in root.iter("h2")] == list(score_report.TITLES)
    assert "run: evaluation" in (root.findtext("head/title") or "")
    assert EVIL in "".join(root.itertext())


def test_equal_results_are_written_as_equal_bytes(result, layout) -> None:
    def written() -> list[bytes]:
        score_report.write_all(layout, copy.deepcopy(result))
        paths = (layout.evaluation_md, layout.evaluation_html, layout.sweep)
        return [storage.read_bytes(path) for path in paths]

    assert written() == written()


def test_what_an_earlier_evaluation_left_is_not_told_of_this_one(result, layout) -> None:
    score_report.write_all(layout, result)
    del result["sweep"], result["memorisation"]
    score_report.write_all(layout, result)
    assert not storage.exists(layout.sweep)
    text = storage.read_bytes(layout.evaluation_md).decode()
    assert "nearest.png" not in text
    assert "sweep.svg" not in text
    assert "Guidance and steps" not in text


@pytest.mark.parametrize("left_out", ["scores", "settings", "warnings", "memorisation", "sweep"])
@pytest.mark.parametrize(
    "instead", [None, "absent", {}, [], 7, EVIL, [EVIL, 7, {"guidance": "x"}], {"32": EVIL}]
)
def test_parts_may_be_absent_or_of_another_kind(result, layout, left_out, instead) -> None:
    if instead == "absent":
        del result[left_out]
    else:
        result[left_out] = instead
    score_report.table(result)
    score_report.write_all(layout, result)
    body(storage.read_bytes(layout.evaluation_html))
    tables_of(storage.read_bytes(layout.evaluation_md).decode())


def test_every_leaf_may_be_null(result, layout) -> None:
    """As in JSON without NaN; and not one of them is shown as a number."""

    def without(tree):
        if isinstance(tree, dict):
            return {key: without(value) for key, value in tree.items()}
        return [without(value) for value in tree] if isinstance(tree, list) else None

    empty = without(result)
    assert score_report.table(empty).startswith("no scores")
    score_report.write_all(layout, empty)
    text = storage.read_bytes(layout.evaluation_md).decode()
    assert not re.search(r"nan|NaN|inf\b", text)
    assert score_tables.tracked(empty) == {}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, "12", EVIL])
def test_a_score_without_a_finite_value_is_a_dash(result, value) -> None:
    result["scores"]["16"]["fd_lite0"] = entry(1.0) | {"value": value}
    text = score_report.table(result)
    assert re.search(r"^16 px +- +5\.43", text, re.MULTILINE)
    assert "evaluate/fd_lite0/16" not in score_tables.tracked(result)


def test_an_older_result_of_plain_numbers_is_shown() -> None:
    old = {"fd_lite0": 12.345678, "is_lite0": 5.4, "is_lite0_std": 0.1}
    tree = {"scores": {"16": old | {"untrained": {"fd_lite0": 261.0}}}, "settings": {"seed": 0}}
    text = score_report.table(tree)
    assert re.search(r"^16 px +12\.35 +5\.4$", text, re.MULTILINE)
    assert "untrained network, 16 px  " in text
    assert "±" not in text
    assert tables_of(score_report.markdown_of(tree, {}))[0][1] == ["16 px", "12.35", "5.4"]


def test_scores_without_resolutions_are_one_row() -> None:
    tree = {"scores": scores(12.0, 5.0, prefix="")}
    text = score_report.table(tree)
    assert text.splitlines()[0].split() == ["resolution", "FID", "IS"]
    assert "pictures" in text
    assert score_tables.tracked(tree)["evaluate/fid"] == 12.0


@pytest.mark.parametrize("prefix", ["", "_clean", "_lite0", "_dinov2", "_abc123"])
def test_the_columns_are_found_whatever_the_extractor(prefix) -> None:
    tree = score_tables.read_scores({"64": scores(3.0, 2.0, prefix)})
    distance, inception = score_tables.columns(tree)
    assert distance in (f"fd{prefix}", f"fid{prefix}")
    assert inception == f"is{prefix}"


def test_trackers_get_flat_names(result) -> None:
    found = score_tables.tracked(json.loads(json.dumps(result)))
    assert found["evaluate/fd_lite0/16"] == 12.345678
    assert found["evaluate/is_lite0/32"] == 6.6
    assert len(found) == 8


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (12.345678, 0.4123, "12.35 ± 0.41"),
        (261.0, 12.3, "261 ± 12"),
        (0.00123, 0.0002, "0.00123 ± 0.00020"),
        (12.3, 1e-15, "12.3000 ± 0.0000"),
        (12345.6, 1234.0, "12,346 ± 1,234"),
        (-0.00002, 0.00004, "-0.000020 ± 0.000040"),
        (7.0, 0.0, "7"),
        (0.0, None, "0"),
    ],
)
def test_a_value_has_the_digits_that_its_interval_leaves(value, half, text) -> None:
    assert score_tables.with_half(score_tables.Score.read(entry(value, half))) == text


@pytest.mark.parametrize(
    ("drawn", "real", "said"),
    [
        (3.0, 4.0, "25 % closer"),
        (4.0, 4.1, "about as far away as"),
        (6.0, 4.0, "farther away than"),
        (3.0, None, "training pictures, at 32 px."),
        (3.0, 0.0, "nothing can be compared"),
        (None, 4.0, ""),
    ],
)
def test_what_the_medians_say(drawn, real, said) -> None:
    tree = {"resolution": 32, "median_distance": drawn, "median_distance_of_reference": real}
    sentence = score_tables.memorisation_sentence(tree)
    assert said in sentence
    assert bool(sentence) == (drawn is not None)


def charts_of(result):
    sweep = sweeps.read(result)
    return sweeps.charts(sweep) if sweep is not None else []


def test_a_sweep_is_a_chart_a_resolution_with_a_curve_for_each_number_of_steps(result) -> None:
    charts = charts_of(result)
    assert [chart.title for chart in charts] == ["fd_lite0 at 16 px", "fd_lite0 at 32 px"]
    for chart in charts:
        assert chart.x_title.startswith("CLIP score")
        assert [line.name for line in chart.lines] == ["10 steps", "25 steps"]
        assert all(line.points == ("1", "2", "3") for line in chart.lines)
        assert len({line.color for line in chart.lines}) == 2
    assert list(charts[0].lines[1].y) == [49, 44, 39]
    assert list(charts[0].lines[1].x_low) == pytest.approx([25.54, 26.54, 27.54])


def test_without_clip_scores_it_is_the_inception_score_and_without_either_guidance(result) -> None:
    for each in result["sweep"]:
        for values in each["scores"].values():
            del values["clip_score"]
    assert charts_of(result)[0].x_title.startswith("is_lite0")
    for each in result["sweep"]:
        for values in each["scores"].values():
            del values["is_lite0"]
    chart = charts_of(result)[0]
    assert chart.x_title == "guidance"
    assert list(chart.lines[0].x) == [1, 2, 3]


def test_where_only_steps_vary_they_stand_at_the_points(result) -> None:
    result["sweep"] = [each for each in result["sweep"] if each["guidance"] == 3]
    (line,) = charts_of(result)[0].lines
    assert line.name == "guidance 3"
    assert line.points == ("10", "25")


def test_points_without_a_score_are_left_out_of_charts_and_dashes_in_tables(result) -> None:
    result["sweep"][0]["scores"]["16"]["fd_lite0"]["value"] = None
    result["sweep"][1]["scores"]["16"]["clip_score"]["interval"] = None
    low = charts_of(result)[0].lines[1]
    assert low.points == ("2", "3")
    assert math.isnan(low.x_low[1])
    sweep = sweeps.read(result)
    assert sweep is not None
    (_, table), _ = sweeps.tables(sweep, score_tables.with_half)
    assert table.rows[3][:3] == ("1", "25", "-")
    root = ET.fromstring(score_report.sweep_svg(result) or b"")
    assert root.tag == f"{SVG}svg"


def test_a_sweep_without_distances_has_tables_alone(result) -> None:
    for each in result["sweep"]:
        for values in each["scores"].values():
            del values["fd_lite0"]
    assert score_report.sweep_svg(result) is None
    text = score_report.markdown_of(result, {})
    assert "### At 16 px" in text
    assert "sweep.svg" not in text
