"""`layered report` makes one page of a run, whole or damaged, that needs nothing else and trusts nothing it shows."""

import base64
import html.parser
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import fsspec
import numpy as np
import pytest
from PIL import Image

from pipelines import cli, grid, pages, report
from pipelines.config import load_config, to_yaml

EVIL = "<script>alert('&amp;')</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """Tags that must balance, texts by tag, attributes."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str | None = None) -> str:
        return "\n".join(text for name, text in self.texts if tag in (None, name))


def record(number: int, total: int = 40) -> dict:
    """A line of the log with everything that training writes."""
    done = number / total
    loss = {f"loss/{r}": (0.3 * math.exp(-3 * done) + 0.01) * r for r in (16, 32)}
    bins = {f"loss/{r}/logsnr_{m}": 0.1 / (m + 9) for r in (16, 32) for m in range(-7, 8, 2)}
    val = {f"val/loss/{r}": 0.2 * r for r in (16, 32)} if number % 10 == 0 else {}
    return {
        "images": 640 * number,
        **loss,
        **bins,
        **val,
        "time/data": 0.1,
        "time/model": 0.9,
        "grad_norm": math.nan if number == 7 else 1.0 + done,
        "learning_rate": 1e-3,
        "images_per_second": 80.0,
        "memory/device_peak_bytes": 6e9,
        f"new/{EVIL}": done,
        "status": EVIL,
    }


def sheet(seed: int, width: int = 64) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (64, width, 3), np.uint8)
    return grid.png_bytes(Image.fromarray(noise))


@pytest.fixture
def folder(tmp_path):
    """A finished run with all its files."""
    made = tmp_path / "run"
    (made / "samples").mkdir(parents=True)
    (made / "model").mkdir()
    config = load_config("demo", ["train.num_images=25600", f"dataset={json.dumps(EVIL)}"])
    (made / "config.yaml").write_text(to_yaml(config))
    (made / "metrics.jsonl").write_text(
        "".join(json.dumps(record(number)) + "\n" for number in range(1, 41))
    )
    (made / "model" / "config.json").write_text('{"num_images_trained": 25600}')
    for number in range(1, 21):
        (made / "samples" / f"{1000 * number:09d}.png").write_bytes(sheet(number))
    (made / "samples" / "a-red-apple-0-sheet.png").write_bytes(sheet(99))
    (made / "grid.png").write_bytes(sheet(0, width=2000))
    scores = {"fd_lite0": 12.345678, "untrained": {"fd_lite0": 261.0}}
    tree = {"scores": {"16": scores, "32": scores}, "settings": {"seed": 0}, "warnings": [EVIL]}
    (made / "metrics.json").write_text(json.dumps(tree))
    environment = {"python": "3.11.7", "packages": {"torch": EVIL}, "devices": ["A", "B"]}
    (made / "environment.json").write_text(json.dumps(environment))
    return made


def made(folder, *arguments: str) -> Page:
    assert cli.main(["report", str(folder), *arguments]) == 0
    return Page((folder / "report.html").read_bytes())


def keep_lines(folder, count: int, rest: str = "") -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:count]) + rest)


def test_tells_of_a_finished_run(folder, capsys) -> None:
    page = made(folder)
    assert capsys.readouterr().out == f"report: {folder}/report.html\n"
    text = page.text()
    for fact in ("finished", "demo", "25,600 of 25,600", "5 min 20 s", "1,828,673", "8, 16, 32 px"):
        assert fact in text
    assert "not finished" not in text
    titles = page.text("h2").splitlines()
    assert titles == [
        "Training",
        "Validation",
        "Pictures while training",
        "Scores",
        "How it was evaluated",
        "Loss by noise level",
        "Speed and memory",
        "Other values",
        "All values",
        "Environment",
        "Configuration",
    ]
    assert "12.35" in page.text("td")
    assert "A, B" in page.text("td")


def test_what_the_evaluation_found_is_there_with_its_charts(folder) -> None:
    scores = {"fd_lite0": {"value": 12.0, "interval": [11.5, 12.5]}, "is_lite0": {"value": 5.0}}
    sweep = [{"guidance": g, "num_steps": 25, "scores": {"32": scores}} for g in (1.0, 3.0)]
    nearest = {"median_distance": 3.0, "median_distance_of_reference": 4.0}
    tree = {"scores": {"32": scores}, "sweep": sweep, "memorisation": nearest}
    (folder / "metrics.json").write_text(json.dumps(tree))
    (folder / "nearest.png").write_bytes(sheet(7))
    page = made(folder)
    titles = page.text("h2").splitlines()
    assert titles[3:6] == ["Scores", "Guidance and steps", "Nearest training pictures"]
    assert "12.00 (11.50 to 12.50)" in page.text("td")
    assert "25 % closer" in page.text("p")
    assert "fd_lite0 at 32 px" in page.text("b")
    assert len(page.all("img")) == report.MAX_GRIDS + 2


def test_refers_to_nothing_outside_and_runs_no_script(folder) -> None:
    page = made(folder)
    content = (folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", content)
    assert not page.all("script")
    assert not page.all("link")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {attributes["href"][0] for attributes in page.all("a")} == {"#"}
    assert {attributes["src"].partition(":")[0] for attributes in page.all("img")} == {"data"}
    targets = {a["id"] for a in page.all("section")}
    assert {a["href"].removeprefix("#") for a in page.all("a")} == targets


def test_whatever_is_shown_is_text(folder) -> None:
    page = made(folder)
    for tag in ("td", "pre", "p", "b"):
        assert EVIL in page.text(tag), tag
    assert EVIL not in (folder / "report.html").read_text()


def test_every_chart_is_xml_and_says_what_it_shows(folder) -> None:
    made(folder)
    drawings = re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)
    # loss, gradient, rate; 2 validation; 1 + 2 noise; speed, time, memory; 1 other
    assert len(drawings) == 12
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.attrib["role"] == "img"
        assert root.findtext("title") == root.attrib["aria-label"]
        assert root.attrib["aria-label"].strip()


def test_every_key_is_there_by_name(folder) -> None:
    shown = made(folder).text("th").splitlines()
    for key in record(10):
        assert key in shown or key == "images"


def test_an_unfinished_run_tells_what_is_left(folder) -> None:
    keep_lines(folder, 20, rest='{"images": 13440, "lo')
    (folder / "model" / "config.json").unlink()
    text = made(folder).text()
    assert "not finished" in text
    assert "12,800 of 25,600" in text
    assert "left at the latest speed\n2 min 40 s" in text
    assert "cannot be read" not in text


def test_one_line_of_the_log_is_enough(folder) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "metrics.jsonl":
            path.unlink()
    keep_lines(folder, 1)
    page = made(folder)
    assert page.text("h2").splitlines() == [
        "Training",
        "Loss by noise level",
        "Speed and memory",
        "Other values",
        "All values",
    ]
    assert "nan" not in "".join(a["d"] or "" for a in page.all("path"))


@pytest.mark.parametrize("line", ['{"images": 640}', '{"images": 640, "loss/8": NaN, "time/a": 0}'])
def test_a_line_of_nearly_nothing_is_enough(tmp_path, line) -> None:
    (tmp_path / "metrics.jsonl").write_text(line)
    made(tmp_path)


def test_grids_are_chosen_evenly_with_the_first_and_the_last(folder) -> None:
    captions = re.findall(r"after ([\d,]+) pictures", made(folder).text("figcaption"))
    numbers = [int(caption.replace(",", "")) for caption in captions]
    assert len(numbers) == report.MAX_GRIDS
    assert (numbers[0], numbers[-1]) == (1000, 20000)
    assert max(np.diff(numbers)) <= 3000


def test_small_pictures_are_kept_to_the_bit_and_large_ones_shrunk(folder) -> None:
    page = made(folder)
    sources = [a["src"] for a in page.all("img")]
    contents = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert contents[0] == sheet(1)
    assert len(contents[-1]) < len((folder / "grid.png").read_bytes()) / 2
    with Image.open(io.BytesIO(contents[-1])) as picture:
        assert picture.width == pages.SHEET_WIDTH
        assert str(picture.height) == page.all("img")[-1]["height"]


def test_a_long_log_makes_a_page_of_bounded_size(folder) -> None:
    def size(count: int) -> int:
        lines = (json.dumps(record(number, count)) for number in range(1, count + 1))
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        made(folder)
        return (folder / "report.html").stat().st_size

    assert size(5000) < 1.3 * size(1200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.json", "metrics.json cannot be read"),
        ("environment.json", "environment.json cannot be read"),
        ("samples/000001000.png", "cannot be read as a picture"),
        ("grid.png", "cannot be read as a picture"),
    ],
)
def test_what_is_damaged_is_named(folder, name, message) -> None:
    (folder / name).write_bytes(b'{"scores": \xff')
    assert message in made(folder).text("p")


@pytest.mark.parametrize("text", ["a: [", "7", "train: 3\nmodel: {channels: x}", "\0"])
def test_a_configuration_of_another_kind_is_shown_as_it_is(folder, text) -> None:
    (folder / "config.yaml").write_text(text)
    page = made(folder)
    assert text.replace("\0", "\ufffd") in page.text("pre")
    assert "parameters" not in page.text("dt")


def test_unreadable_lines_are_counted(folder) -> None:
    content = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("garbage\n" + content)
    assert "1 cannot be read and are left out" in made(folder).text("dd")


def test_writes_where_it_is_told(folder, tmp_path, capsys) -> None:
    target = tmp_path / "elsewhere" / "page.html"
    assert cli.main(["report", str(folder), "--output", str(target)]) == 0
    assert target.read_bytes().startswith(b"<!doctype html>")
    assert not (folder / "report.html").exists()


def test_a_run_on_an_object_store_gets_its_page_there(folder) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/stored", recursive=True)
    assert cli.main(["report", "memory://stored"]) == 0
    page = Page(store.cat("/stored/report.html"))
    assert "25,600 of 25,600" in page.text()
    assert len(page.all("img")) == report.MAX_GRIDS + 1
    store.rm("/stored", recursive=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no run there; `layered train --preset NAME --run"),
        ({"config.yaml": "preset: demo"}, "nothing is logged yet; `layered train --run"),
        ({"config.yaml": "preset: demo", "metrics.jsonl": '{"ima'}, "nothing is logged yet"),
    ],
)
def test_without_a_log_one_line_says_what_makes_one(tmp_path, capsys, files, message) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_mistake_of_the_users(folder, capsys) -> None:
    assert cli.main(["report", str(folder), "--output", str(folder / "samples")]) == 2
    assert "the report cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "under 1 s"),
        (59.6, "1 min 0 s"),
        (320, "5 min 20 s"),
        (4e5, "4 d 15 h"),
        (3600, "1 h 0 min"),
    ],
)
def test_durations_have_two_units(seconds, text) -> None:
    assert report.duration(seconds) == text
