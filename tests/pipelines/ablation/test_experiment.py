"""Files of experiments: what they say, and what is refused with the file and the key named."""

import re

import pytest

from pipelines.ablation import cells, experiment
from pipelines.ablation.experiment import SCALES
from pipelines.ablation.grid import Options
from pipelines.config import UserError


def test_without_cells_all_combinations_are_run(small):
    assert small.combinations() == [
        {"noise": noise, "steps": steps} for noise in ("sinc", "box") for steps in ("many", "few")
    ]


def test_the_scales_begin_as_those_in_common(small):
    assert small.scale("small").preset == "demo"
    assert small.scale("small").takes == "a minute"
    assert small.scale("full").seeds


def test_a_level_may_differ_between_scales(text):
    there = "few: {small: {sample.num_steps: 5}, full: {sample.num_steps: 9}}"
    found = experiment.read(text.replace("few: {sample.num_steps: 5}", there), "x.yaml")
    assert found.level("steps", "few", "small") == {"sample.num_steps": 5}
    assert found.level("steps", "few", "full") == {"sample.num_steps": 9}


def test_a_cell_is_compared_with_the_one_that_shares_what_the_baseline_leaves_open(text):
    found = experiment.read(
        text.replace("[{noise: sinc, steps: many}]", "[{noise: sinc}]"), "x.yaml"
    )
    box = {"noise": "box", "steps": "few"}
    assert found.compared_with(box) == [{"noise": "sinc", "steps": "few"}]
    assert found.compared_with({"noise": "sinc", "steps": "few"}) == []


def test_a_cell_is_compared_with_every_baseline_that_is_there(text):
    both = text.replace(
        "[{noise: sinc, steps: many}]", "[{noise: sinc}, {steps: many}, {noise: sinc}]"
    )
    cells = (
        "cells: [{noise: sinc, steps: many}, {noise: box, steps: few}, {noise: sinc, steps: few}]\n"
    )
    found = experiment.read(both.replace("baselines:", f"{cells}baselines:"), "x.yaml")
    few = {"noise": "sinc", "steps": "few"}
    assert found.compared_with({"noise": "box", "steps": "few"}) == [
        few
    ]  # no cell has box and many
    assert found.compared_with(few) == [{"noise": "sinc", "steps": "many"}]


def test_no_two_cells_are_compared_both_ways_round(text):
    both = "[{noise: sinc, steps: many}, {noise: sinc, steps: few}]"
    found = experiment.read(text.replace("[{noise: sinc, steps: many}]", both), "x.yaml")
    many, few = ({"noise": "sinc", "steps": steps} for steps in ("many", "few"))
    assert found.compared_with(few) == [many]
    assert found.compared_with(many) == []
    assert found.compared_with({"noise": "box", "steps": "few"}) == [many, few]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("title:", "titel:", "titel: Key 'titel' not in 'Experiment'. Did you mean: 'title'?"),
        ("title: Noise\n", "title: Noise\ntitle: Noise\n", "line 3: found duplicate key title"),
        ("question: Which noise?\n", "", "question: missing, must be given"),
        ("title: Noise", "title: [1]", "title: "),
        ("concerns: drawing", "concerns: dreams", "factors.steps.concerns='dreams' must be"),
        (
            "{sample.num_steps: 5}",
            "{train.batch_size: 5}",
            "factors.steps.levels.few.train.batch_size: the factor concerns drawing",
        ),
        (
            "{diffusion.noise: box}",
            "{sample.num_steps: 5}",
            "factors.noise.levels.box.sample.num_steps: the factor concerns training",
        ),
        (
            "{diffusion.noise: box}",
            "{noise: box}",
            "factors.noise.levels.box.noise: must be a dotted key",
        ),
        (
            "{diffusion.noise: box}",
            "{budget: money}",
            "factors.noise.levels.box.budget='money' must be one of macs, time",
        ),
        (
            "{diffusion.noise: box}",
            "{images: 0}",
            "factors.noise.levels.box.images=0 must be a number above 0",
        ),
        (
            "{diffusion.noise: box}",
            "{images: 0.5, budget: macs}",
            "factors.noise.levels.box: images and budget exclude each other",
        ),
        (
            "{diffusion.noise: box}",
            "{first: {first: {}}}",
            "factors.noise.levels.box.first: must hold keys of the configuration, or images",
        ),
        (
            "{sample.num_steps: 5}",
            "{images: 0.5}",
            "factors.steps.levels.few.images: is of training",
        ),
        (
            "{diffusion.noise: box}",
            "{small: {diffusion.noise: box}}",
            "factors.noise.levels.box: must hold small and full and nothing else",
        ),
        (
            "baselines: [{noise: sinc, steps: many}]",
            "baselines: [{noise: sinc}, {noise: pink}]",
            "baselines.1.noise='pink' must be one of sinc, box",
        ),
        ("[{noise: sinc, steps: many}]", "[{}]", "baselines.0={} must name levels of"),
        ("[{noise: sinc, steps: many}]", "[]", "baselines: there must be one at least"),
        (
            "baselines:",
            "cells: [{noise: sinc, steps: many}]\nbaselines:",
            "factors.noise.levels.box: no cell uses it",
        ),
        (
            "baselines:",
            "cells: [{noise: sinc}]\nbaselines:",
            "cells.0: must name a level of noise, steps, in this order",
        ),
        (
            "baselines:",
            "cells: [{noise: sinc, steps: many}, {noise: sinc, steps: many}]\nbaselines:",
            "cells.1: .* is there already",
        ),
        (
            "baselines:",
            "cells: [{noise: box, steps: many}, {noise: box, steps: few}, {noise: sinc, steps: few}]\nbaselines:",
            "baselines: there is no such cell",
        ),
        ("fd: lower", "fd: down", "metrics.fd='down' must be one of lower, higher, none"),
        ("fd: lower", "beauty: higher", "metrics.beauty: must be one of fd, "),
        ("{takes: a minute}", "{seeds: [1, 1]}", r"scales.small.seeds=\[1, 1\] must be different"),
        ("metrics:", "curve: {across: sample}\nmetrics:", "curve=.* must have across"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(text, before, after, said):
    assert text.count(before) == 1
    with pytest.raises(UserError) as caught:
        experiment.read(text.replace(before, after), "noise.yaml")
    told = str(caught.value)
    assert re.match(said, told), told
    assert told.endswith("(noise.yaml)")
    assert "\n" not in told


def test_a_value_that_the_configuration_refuses_is_told_with_its_cell(text):
    found = experiment.read(text.replace("diffusion.noise: box", "diffusion.noise: pink"), "x.yaml")
    with pytest.raises(
        UserError, match=r"diffusion.noise.*pink.*\(cell noise pink|\(cell noise box"
    ):
        cells.make_grid("x", found, Options(scale="small"), lambda one, other: 1.0)


def test_what_is_no_experiment_is_told(tmp_path):
    with pytest.raises(UserError, match="experiment 'e99' must be one of e1, "):
        experiment.load("e99")
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        experiment.load(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="must be a mapping"):
        experiment.load(str(tmp_path / "list.yaml"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiment.names())
def test_every_cell_of_every_experiment_has_a_configuration(name, scale):
    """The files that come along, at both scales."""
    _, found = experiment.load(name)
    options = Options(scale=scale, data="/some/folder")
    grid = cells.make_grid(name, found, options, lambda one, other: 1.5)
    assert len(grid.cells) == len(found.combinations()) * len(found.scale(scale).seeds)
    assert not grid.left_out
    assert len({cell.path for cell in grid.cells}) == len(grid.cells)


def test_there_are_eight():
    assert experiment.names() == [f"e{number}" for number in range(1, 9)]
