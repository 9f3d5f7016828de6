"""Cells: what their directories are named after, what they share, and how long they train."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipelines import recipe
from pipelines.ablation import cells, experiment
from pipelines.ablation.grid import Options, label
from pipelines.config import UserError


def grid_of(found, store="runs", *, speed=lambda one, other: 1.0, **options):
    return cells.make_grid("x", found, Options(scale="small", store=str(store), **options), speed)


def changed(text, before, after):
    assert before in text
    return experiment.read(text.replace(before, after), "x.yaml")


def test_cells_that_differ_in_drawing_alone_share_a_training(small):
    grid = grid_of(small, seeds=(0,))
    trained = {cell.label: cell.training.path for cell in grid.cells}
    assert trained["sinc, many"] == trained["sinc, few"] != trained["box, many"]
    assert len({cell.path for cell in grid.cells}) == 4


def test_a_seed_is_a_training_and_seeds_come_one_after_the_other(small):
    grid = grid_of(small, seeds=(3, 1))
    assert [cell.seed for cell in grid.cells] == [3] * 4 + [1] * 4
    assert grid.seeds == [3, 1]
    assert all(cell.training.config.seed == cell.config.seed == cell.seed for cell in grid.cells)
    one, other = (grid.cells[number].training.path for number in (0, 4))
    assert one != other


def test_cells_of_several_experiments_that_are_the_same_have_one_directory():
    """The ordinary model stands in the middle of most experiments."""
    grids = {
        name: grid_of(experiment.load(name)[1], data="/data")
        for name in ("e1", "e2", "e3", "e4", "e5", "e6", "e7")
    }
    trained = [{cell.training.path for cell in grid.cells} for grid in grids.values()]
    assert len(set.intersection(*trained)) == 3  # its seeds
    drawn = [{cell.path for cell in grids[name].cells} for name in grids if name != "e3"]
    assert len(set.intersection(*drawn)) == 3


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=1e-3",
        "model.dropout=0.1",
        "train.num_images=64",
        "text.max_tokens=9",
        "text.precision=bfloat16",
    ],
)
def test_what_decides_the_model_decides_its_directory(small, override):
    before, after = grid_of(small), grid_of(small, overrides=(override,))
    assert before.cells[0].training.path != after.cells[0].training.path


@pytest.mark.parametrize(
    "override",
    ["train.log_every_images=64", "train.cpus_per_worker=3", "ray.num_cpus=9", "serve.port=80"],
)
def test_what_does_not_decide_it_leaves_its_directory(small, override):
    before, after = grid_of(small), grid_of(small, overrides=(override,))
    assert [cell.path for cell in before.cells] == [cell.path for cell in after.cells]


def test_the_evaluation_s_settings_leave_the_training(small):
    before, after = grid_of(small), grid_of(small, overrides=("evaluate.num_images=30",))
    assert before.cells[0].training.path == after.cells[0].training.path
    assert before.cells[0].path != after.cells[0].path


def test_a_store_elsewhere_has_the_same_names(small, tmp_path):
    before, after = grid_of(small), grid_of(small, tmp_path)
    names = [[Path(cell.path).name for cell in grid.cells] for grid in (before, after)]
    assert names[0] == names[1]


def test_two_ways_to_say_the_same_have_one_directory(text):
    plain = experiment.read(text, "x.yaml")
    said = changed(
        text,
        "sinc: {diffusion.noise: sinc}",
        "sinc: {diffusion.noise: sinc, diffusion.picture_kernel: sinc, diffusion.extra_logsnr: [0, 0, 0], "
        "diffusion.layer_weights: [2, 2, 2]}",
    )
    assert grid_of(plain).cells[0].path == grid_of(said).cells[0].path


def test_evaluations_read_the_training_s_model_and_write_beside(small):
    cell = grid_of(small).cells[1]
    assert cell.config.evaluate.model == f"{cell.training.path}/model"
    assert cell.config.run == cell.path != cell.training.path
    assert cell.config.sample.num_steps == 5


def test_a_share_of_the_pictures_scales_the_learning_rate_s_rise_and_fall(text):
    found = changed(text, "box: {diffusion.noise: box}", "box: {images: 0.5}")
    grid = grid_of(found, seeds=(0,))
    whole, half = (grid.cells[number].training.config.train for number in (0, 2))
    assert half.num_images == whole.num_images / 2
    assert half.warmup_images == whole.warmup_images / 2
    assert half.cooldown_images == whole.cooldown_images / 2


def test_equal_multiply_adds(text):
    found = changed(
        text, "box: {diffusion.noise: box}", "box: {model.kind: single_scale, budget: macs}"
    )
    grid = grid_of(found, seeds=(0,))
    layered, single = (grid.cells[number].training for number in (0, 2))
    assert single.config.train.num_images < layered.config.train.num_images
    step = single.config.train.batch_size * recipe.step_macs(single.config)
    assert abs(single.macs - layered.macs) <= step / 2


def test_equal_time_asks_for_the_speed(text):
    found = changed(
        text, "box: {diffusion.noise: box}", "box: {diffusion.noise: box, budget: time}"
    )
    asked = []

    def speed(one, other):
        asked.append((one.diffusion.noise, other.diffusion.noise))
        return 2.0

    grid = grid_of(found, seeds=(0,), speed=speed)
    whole, half = (grid.cells[number].training.config.train for number in (0, 2))
    assert half.num_images == whole.num_images / 2
    assert set(asked) == {("box", "sinc")}


GROWN = """box:
        images: 0.5
        first: {model.resolutions: [8, 16], model.channels: [32, 32, 32], model.blocks: [2, 1, 1], images: 0.25}"""


def test_growth_is_a_training_before_whose_cost_counts(text):
    grid = grid_of(changed(text, "box: {diffusion.noise: box}", GROWN), seeds=(0,))
    grown = grid.cells[2].training
    assert grown.first is not None
    assert grown.config.train.grow_from == f"{grown.first.path}/model"
    assert grown.first.config.model.resolutions == (8, 16)
    assert [part.config.train.num_images for part in grown.chain] == [1024, 2048]
    parts = [recipe.step_macs(p.config) * p.config.train.num_images for p in grown.chain]
    assert grown.macs == sum(parts)
    # One dataset does for both.
    assert grown.first.dataset.path == grown.dataset.path == grid.cells[0].training.dataset.path


def test_another_beginning_is_another_training(text):
    one = grid_of(changed(text, "box: {diffusion.noise: box}", GROWN), seeds=(0,))
    longer = GROWN.replace("images: 0.25", "images: 0.5")
    other = grid_of(changed(text, "box: {diffusion.noise: box}", longer), seeds=(0,))
    assert one.cells[2].training.path != other.cells[2].training.path


def test_equal_multiply_adds_include_what_it_grew_from(text):
    budget = GROWN.replace("images: 0.5\n", "budget: macs\n")
    grid = grid_of(changed(text, "box: {diffusion.noise: box}", budget), seeds=(0,))
    scratch, grown = grid.cells[0].training, grid.cells[2].training
    step = grown.config.train.batch_size * recipe.step_macs(grown.config)
    assert abs(grown.macs - scratch.macs) <= step / 2


def test_a_beginning_that_costs_it_all_is_refused(text):
    budget = GROWN.replace("images: 0.5\n", "budget: macs\n").replace("images: 0.25", "images: 9")
    with pytest.raises(UserError, match="first: costs as much as the whole baseline"):
        grid_of(changed(text, "box: {diffusion.noise: box}", budget), seeds=(0,))


def test_a_baseline_with_a_budget_is_refused(text):
    found = changed(text, "sinc: {diffusion.noise: sinc}", "sinc: {budget: macs}")
    with pytest.raises(UserError, match="baselines: sinc, many has a budget, and is compared with"):
        grid_of(found)
    found = changed(
        text.replace("[{noise: sinc, steps: many}]", "[{noise: box}]").replace(
            "sinc: {diffusion.noise: sinc}", "sinc: {budget: macs}"
        ),
        "box: {diffusion.noise: box}",
        "box: {diffusion.noise: box, budget: time}",
    )
    with pytest.raises(UserError, match="baselines: the level of box, many has a budget"):
        grid_of(found)


def test_without_data_what_needs_it_is_left_out(text):
    found = changed(text, "box: {diffusion.noise: box}", 'box: {data.train_images: "{data}/train"}')
    grid = grid_of(found, seeds=(0,))
    assert [cell.label for cell in grid.cells] == ["sinc, many", "sinc, few"]
    assert [label(levels) for levels in grid.left_out] == ["box, many", "box, few"]
    grid = grid_of(found, seeds=(0,), data='/my "own" pictures')
    box = grid.cells[2].training
    assert box.config.data.train_images == '/my "own" pictures/train'
    assert box.dataset.path != grid.cells[0].training.dataset.path


def test_a_higher_model_has_a_dataset_of_its_own(text):
    found = changed(
        text,
        "box: {diffusion.noise: box}",
        "box: {model.resolutions: [8, 16, 64], model.channels: [8, 16, 32, 32, 32], model.blocks: [1, 1, 1, 1, 1]}",
    )
    grid = grid_of(found, seeds=(0,))
    low, high = grid.cells[0].training.dataset, grid.cells[2].training.dataset
    assert (low.config.model.resolutions[-1], high.config.model.resolutions[-1]) == (32, 64)
    assert low.path != high.path


def test_a_training_is_finished_when_its_model_has_seen_all(small, tmp_path):
    training = grid_of(small, tmp_path).cells[0].training
    assert not training.finished
    path = Path(training.path, "model", "config.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"num_images_trained": 100}))
    assert not training.finished
    path.write_text(json.dumps({"num_images_trained": training.config.train.num_images}))
    assert training.finished


def test_models_that_grow_from_what_is_not_the_experiment_s_are_refused(small):
    with pytest.raises(UserError, match=r"train.grow_from='/some/model': an experiment's models"):
        grid_of(small, overrides=("train.grow_from=/some/model",))


def test_a_preset_in_place_of_the_scale_s(small):
    grid = grid_of(small, preset="emoji128", overrides=("evaluate.num_kept=1",))
    assert Path(grid.cells[0].path).name.startswith("emoji128-0-")


def test_an_override_that_is_wrong_is_told_with_the_scale(small):
    with pytest.raises(UserError, match=r"train.foo.*\(scale small\)"):
        grid_of(small, overrides=("train.foo=1",))


def test_configurations_are_whole(small):
    """They are handed to stages as they are."""
    for cell in grid_of(small).cells:
        for config in (cell.config, cell.training.config, cell.training.dataset.config):
            assert dataclasses.replace(config) == config
