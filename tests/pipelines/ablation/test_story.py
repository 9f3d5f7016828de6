"""The report: its numbers are the cells' own, its sentences follow from them, and its page stands alone."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from pipelines.ablation import cells, control, experiment, figures, findings, story
from pipelines.ablation.grid import Options
from pipelines.grid import png_bytes

SEEDS = (0, 1, 2)
NOISE = {0: 0.0, 1: 3.0, 2: -2.0}  # of a seed, the same in every cell
EFFECT = {"sinc, many": 0.0, "sinc, few": 9.0, "box, many": -9.0, "box, few": 0.1}


def fd(label: str, seed: int, size: int) -> float:
    """What a cell is made to have: seeds lie far apart, what they differ in is the same but for a little."""
    return 50 + size + NOISE[seed] + EFFECT[label] + 0.1 * ((seed * 7 + len(label)) % 3)


def write_cell(cell) -> None:
    """What training and evaluation leave of a cell, as far as a report reads it."""
    run, here = Path(cell.training.path), Path(cell.path)
    (run / "model").mkdir(parents=True, exist_ok=True)
    number = cell.training.config.train.num_images
    (run / "model" / "config.json").write_text(json.dumps({"num_images_trained": number}))
    (run / "config.yaml").write_text("{}")
    lines = [
        {
            "images": number * step // 8,
            "images_per_second": 100.0,
            "memory/process_bytes": 300 * 2**20,
            "loss/8": 1.0 / step,
            "val/loss/8": 2.0 / step,
        }
        for step in range(1, 9)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {
        str(size): {
            "fd_lite0": {"value": fd(cell.label, cell.seed, size), "interval": [0, 1]},
            "fd_lite0_infinity": {"value": 1e9},
            "is_lite0": {"value": 2.0 + cell.seed},
        }
        for size in (8, 16, 32)
    }
    here.mkdir(parents=True, exist_ok=True)
    (here / "metrics.json").write_text(json.dumps({"scores": scores}))
    for size in (8, 16, 32):
        folder = here / "pictures-0123" / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        for picture in range(3):
            shade = 40 * picture + 60 * (cell.levels["noise"] == "box")
            tile = Image.new("RGB", (size, size), (shade, shade, 200))
            (folder / f"{picture:05d}.png").write_bytes(png_bytes(tile))


@pytest.fixture
def grid(small, judged, tmp_path):
    """All of its cells but one are there."""
    options = Options(
        scale="small",
        seeds=SEEDS,
        store=str(tmp_path / "store"),
        dataset=judged.dataset,
        overrides=("evaluate.num_kept=3",),
    )
    made = cells.make_grid("noise", small, options, lambda one, other: 1.0)
    for cell in made.cells[:-1]:
        write_cell(cell)
    return made


@pytest.fixture
def report(grid, tmp_path):
    """Both pages, and the folder that they are in."""
    found = findings.gather(grid)
    failed = {grid.cells[-1].path: "evaluate ended with 1: no room <here>"}
    paths = story.write(found, str(tmp_path / "out"), "layered ablate noise", failed)
    return [Path(path).read_text() for path in paths], tmp_path / "out"


def test_the_numbers_are_the_cells_own(grid):
    found = findings.gather(grid)
    assert set(found.values) == {
        *(("fd", size) for size in ("8", "16", "32")),
        *(("is", size) for size in ("8", "16", "32")),
        ("train_loss", "8"),
    }
    assert found.values["fd", "16"]["box, many"] == {s: fd("box, many", s, 16) for s in SEEDS}
    assert found.names == {"fd": "fd_lite0", "is": "is_lite0"}
    # Of the last quarter of eight lines.
    assert found.values["train_loss", "8"]["sinc, many"][0] == pytest.approx((1 / 7 + 1 / 8) / 2)


def test_verdicts_follow_from_paired_differences(grid):
    found = findings.gather(grid).judged["fd", "32"]
    judged = {cell: one for (cell, baseline), one in found.items() if baseline == "sinc, many"}
    assert len(judged) == len(found)
    assert judged["box, many"].verdict == "better"
    assert judged["sinc, few"].verdict == "worse"
    assert judged["box, few"].verdict == "no difference seen"
    assert judged["box, few"].difference.number == 2  # a seed is missing
    # A baseline is not compared with itself.
    assert "sinc, many" not in judged


def test_metrics_that_are_only_shown_are_not_judged(grid):
    judged = findings.gather(grid).judged["train_loss", "8"]
    assert {one.verdict for one in judged.values()} == {"not judged"}


def test_a_baseline_that_leaves_a_factor_open_makes_families_of_their_own(text, grid):
    grid.experiment.baselines[:] = [{"noise": "sinc"}]
    found = findings.gather(grid)
    assert found.groups == {
        "sinc, many": ["sinc, many", "box, many"],
        "sinc, few": ["sinc, few", "box, few"],
    }
    pair = ("box, many", "sinc, many")
    assert set(found.judged["fd", "32"]) == {pair, ("box, few", "sinc, few")}
    # Of one comparison nothing is corrected.
    only = found.judged["fd", "32"][pair]
    assert only.adjusted == only.difference.p
    told = story.told(found)
    assert "At 32 px, box, many against sinc, many: better" in told


def test_cells_that_differ_in_the_same_factors_are_a_family(grid):
    """What differs in noise, in steps, in both: three questions, each with its own correction."""
    assert findings.gather(grid).families == [
        ("sinc, many", ["sinc, few"]),
        ("sinc, many", ["box, many"]),
        ("sinc, many", ["box, few"]),
    ]


def test_what_comes_to_the_same_runs_is_compared_once_and_said(text, judged, tmp_path):
    same = text.replace("few: {sample.num_steps: 5}", "few: {}")
    options = Options(
        scale="small",
        seeds=SEEDS,
        store=str(tmp_path / "store"),
        dataset=judged.dataset,
        overrides=("evaluate.num_kept=3",),
    )
    grid = cells.make_grid(
        "noise", experiment.read(same, "x.yaml"), options, lambda one, other: 1.0
    )
    for cell in grid.cells:
        if cell.levels["steps"] == "many":
            write_cell(cell)
    found = findings.gather(grid)
    assert found.same == {"sinc, few": "sinc, many", "box, few": "box, many"}
    assert found.families == [("sinc, many", ["box, many"])]
    paths = story.write(found, str(tmp_path / "out"), "layered ablate noise", {})
    assert "box, few comes to the very runs of box, many" in Path(paths[0]).read_text()


def test_costs_are_counted_and_read(grid):
    cost = findings.gather(grid).costs["sinc, few"]
    training = grid.cells[1].training
    assert cost.num_images == training.config.train.num_images
    assert cost.training_macs == training.macs
    assert cost.training_seconds == pytest.approx(cost.num_images / 100)
    assert cost.memory_bytes == 300 * 2**20
    assert cost.drawing_macs == pytest.approx(2 * 5 * cost.forward_macs)


@pytest.mark.parametrize(
    ("override", "passes"),
    [
        ("sample.guidance=1.0", 20),
        ("sample.layer_guidance=[1,1,1]", 20),
        ("sample.layer_guidance=[1,1,2]", 40),
        ("sample.sampler=heun", 2 * (2 * 19 + 1)),
        ("sample.num_steps=7", 14),
    ],
)
def test_drawing_costs_what_the_network_is_asked(small, override, passes):
    options = Options(scale="small", seeds=(0,), overrides=(override,))
    cell = cells.make_grid("x", small, options, lambda one, other: 1.0).cells[0]
    one = findings.drawing_macs(cell.training.config, cell.config) / passes
    assert one == findings.cost_of(cell, None).forward_macs


def test_a_hand_over_costs_less(small):
    costs = []
    for override in ("sample.hand_over=null", "sample.hand_over=-4.0", "sample.hand_over=0.0"):
        options = Options(scale="small", seeds=(0,), overrides=(override,))
        cell = cells.make_grid("x", small, options, lambda one, other: 1.0).cells[0]
        costs.append(findings.drawing_macs(cell.training.config, cell.config))
    assert costs[0] > costs[1] > costs[2]


def test_both_pages_say_the_same_in_the_same_order(report):
    (text, page), _ = report
    words = _words(MarkdownIt("commonmark").enable("table").render(text))
    for sentence in re.findall(r"At 32 px, [^.]*\.", words):
        assert sentence in _words(page)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Question",
        "Conclusions",
        "Numbers",
        "Pictures",
        "Cost",
        "How it was done",
    ]


def test_conclusions_are_of_the_first_metric_from_the_top_down(report):
    (text, _), _ = report
    conclusions = text.partition("## Conclusions")[2].partition("## Numbers")[0]
    found = re.findall(r"^At (\d+) px, (.*?): (better|worse|no difference seen)", conclusions, re.M)
    assert [(size, cell) for size, cell, _ in found] == [
        (size, cell)
        for size in ("32", "16", "8")
        for cell in ("sinc, few", "box, many", "box, few")
    ]
    assert {verdict for *_, verdict in found} == {"better", "worse", "no difference seen"}
    assert "Holm" in conclusions


def test_every_seed_s_number_is_there(report):
    (text, page), _ = report
    for seed in SEEDS:
        assert f"{fd('sinc, many', seed, 32):.6g}" in text
        assert f"{fd('sinc, many', seed, 32):.6g}" in page


def test_what_is_missing_is_said_with_its_cause(report):
    (text, page), _ = report
    assert "Missing: box, few, seed 2: evaluate ended with 1: no room &lt;here&gt;" in text
    assert "no room &lt;here&gt;" in page
    assert "11 of 12 runs are there" in text


def test_a_small_version_says_so(report):
    (text, page), _ = report
    assert "This is the small version" in text
    assert "This is the small version" in page


def test_one_seed_has_no_verdict(small, judged, tmp_path):
    options = Options(
        scale="small", seeds=(0,), store=str(tmp_path / "one"), dataset=judged.dataset
    )
    grid = cells.make_grid("noise", small, options, lambda one, other: 1.0)
    for cell in grid.cells:
        write_cell(cell)
    assert "no spread (fd_lite0 " in story.told(findings.gather(grid))
    assert "better" not in story.told(findings.gather(grid)).partition("may be.")[2]


def test_the_page_needs_no_other_file(report):
    (_, page), _ = report
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_pictures_lie_beside_the_markdown_and_are_the_cells_own(report):
    (text, _), folder = report
    files = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert files == ["noise.svg", "noise-32px.png", "noise-16px.png", "noise-8px.png"]
    assert {path.name for path in folder.iterdir()} == {*files, "noise.md", "noise.html"}
    with Image.open(io.BytesIO((folder / "noise-32px.png").read_bytes())) as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 20)}
    # Both cells' pictures, in their order of shade.
    assert {(shade, shade, 200) for shade in (0, 40, 80, 60, 100, 140)} <= colors
    ElementTree.fromstring((folder / "noise.svg").read_text())


def test_pictures_of_somebody_s_data_are_not_in_a_report(text, judged, tmp_path):
    theirs = text.replace("box: {diffusion.noise: box}", 'box: {data.train_images: "{data}/x"}')
    options = Options(
        scale="small",
        seeds=SEEDS,
        store=str(tmp_path / "store"),
        dataset=judged.dataset,
        data="/theirs",
        overrides=("evaluate.num_kept=3",),
    )
    found = experiment.read(theirs, "x.yaml")
    grid = cells.make_grid("noise", found, options, lambda one, other: 1.0)
    for cell in grid.cells:
        write_cell(cell)
    told = Path(
        story.write(findings.gather(grid), str(tmp_path / "out"), "layered ablate", {})[0]
    ).read_text()
    assert "What was drawn of the data that --data names is not shown here" in told
    with Image.open(tmp_path / "out" / "noise-32px.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(shade, shade, 200) for shade in (0, 40, 80)} <= colors  # sinc's
    assert not {(shade, shade, 200) for shade in (60, 100, 140)} & colors  # box's


def test_the_same_cells_give_the_same_files(report, grid):
    _, folder = report
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    failed = {grid.cells[-1].path: "evaluate ended with 1: no room <here>"}
    story.write(findings.gather(grid), str(folder), "layered ablate noise", failed)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_experiment_with_curves_draws_them(text, grid):
    grid.experiment.curve.update(across="drawing_macs", factor="noise")
    found = findings.gather(grid)
    (top, *_) = figures.curves(found)
    assert [line.name for line in top.lines] == ["sinc", "box"]
    sinc = top.lines[0]
    costs = [found.costs[cell].drawing_macs / 1e9 for cell in ("sinc, few", "sinc, many")]
    assert sinc.x.tolist() == costs
    assert sinc.y.tolist() == [
        np.mean([fd(c, s, 32) for s in SEEDS]) for c in ("sinc, few", "sinc, many")
    ]


def test_shares_of_control_by_hand():
    """Low band of the one, high band of the other."""
    rng = np.random.RandomState(0)
    import torch

    from layered_model.images import to_float
    from layered_model.resample import downscale, upscale

    own, other = (
        torch.from_numpy(rng.randint(60, 190, (5, 32, 32, 3)).astype(np.uint8)) for _ in "ab"
    )
    low = upscale(downscale(to_float(own), 8), 32)
    high = to_float(other) - upscale(downscale(to_float(other), 8), 32)
    mixed = ((low + high + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    shares = control.band_shares(own, mixed, other, (8, 32), "sinc")
    assert shares == pytest.approx([0, 1], abs=0.03)
    assert control.band_shares(own, own, other, (8, 32), "sinc") == [0, 0]
    assert control.band_shares(own, other, other, (8, 32), "sinc") == pytest.approx([1, 1])


def test_control_is_measured_where_a_model_drew_with_either_caption_alone(judged, tmp_path):
    _, found = experiment.load("e6")
    options = Options(scale="small", seeds=(0,), store=str(tmp_path), dataset=judged.dataset)
    grid = cells.make_grid("e6", found, options, lambda one, other: 1.0)
    shade = {"own, even": 0, "upper other, even": 30, "all other, even": 90}
    for cell in grid.cells:
        if cell.label not in shade:
            continue
        Path(cell.path).mkdir(parents=True)
        Path(cell.path, "metrics.json").write_text("{}")
        folder = Path(cell.path, "pictures-0", "32")
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = np.full((32, 32, 3), 50, np.uint8)
            pixels[::2] += shade[cell.label]
            (folder / f"{number:05d}.png").write_bytes(png_bytes(Image.fromarray(pixels)))
    shares = {(name, size): share for name, _, size, share in control.shares(grid)}
    assert set(shares) == {("upper other, even", size) for size in ("8", "16", "32")}
    assert shares["upper other, even", "32"] == pytest.approx(1 / 3, abs=0.01)


def _words(page: str) -> str:
    """The text of a page, without its markup."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(page)
    return " ".join(" ".join(found).split())
