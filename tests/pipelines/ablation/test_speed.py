"""Seconds of a step and of a picture: measured once, kept, and taken again. What they come to no test can know."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipelines import recipe
from pipelines.ablation import cells, pace, speed
from pipelines.ablation.grid import Options
from pipelines.ablation.speed import Speeds
from pipelines.config import UserError, load_config

SMALL = (
    "model.channels=[8,8,8,8]",
    "model.head_width=8",
    "train.batch_size=4",
    "train.num_workers=1",
    "train.warmup_images=0",
)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(speed, "REPEATS", 2)
    monkeypatch.setattr(speed, "WARM_UP", 1)
    return load_config("demo", [*SMALL, "model.kind=single_scale"]), load_config("demo", SMALL)


def test_a_ratio_is_measured_once(pair, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    speeds = Speeds(str(tmp_path), measure=True)
    ratio = speeds(*pair)
    assert ratio > 0
    assert torch.get_num_threads() == threads
    (kept,) = json.loads(Path(speeds.path).read_text()).values()
    assert kept["ratio"] == ratio
    assert all(seconds > 0 for seconds in kept["seconds"])
    monkeypatch.setattr(speed, "measured", lambda *pair: pytest.fail("is measured again"))
    assert Speeds(str(tmp_path), measure=True)(*pair) == ratio
    assert Speeds(str(tmp_path), measure=False)(*pair) == ratio
    # What a step's time does not depend on changes nothing.
    longer = [dataclasses.replace(one, seed=7, run="elsewhere") for one in pair]
    assert Speeds(str(tmp_path), measure=True)(*longer) == ratio


def test_without_measuring_multiply_adds_stand_in_and_nothing_is_kept(pair, tmp_path):
    speeds = Speeds(str(tmp_path), measure=False)
    assert speeds(*pair) == recipe.step_macs(pair[0]) / recipe.step_macs(pair[1])
    assert speeds.guessed
    assert not list(tmp_path.iterdir())


def test_equal_steps_are_not_measured(pair, tmp_path):
    speeds = Speeds(str(tmp_path), measure=False)
    assert speeds(pair[0], dataclasses.replace(pair[0], seed=3)) == 1
    assert not speeds.guessed


def test_crops_and_grown_networks_have_a_step_too(pair, monkeypatch):
    cropped = load_config(
        "demo",
        [
            *SMALL,
            "model.upper_norm=pixel",
            "train.crop_resolution=16",
            "train.accumulation_steps=2",
        ],
    )
    step = speed._step(cropped)
    step()
    step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_the_gpu_nothing_is_measured(pair):
    configs = [
        dataclasses.replace(one, train=dataclasses.replace(one.train, use_gpu=True)) for one in pair
    ]
    with pytest.raises(UserError, match=r"budget: time is measured where .* no GPU here"):
        speed.measured(*configs)


def test_drawing_is_measured_for_the_first_seed_and_once(
    small, judged, tmp_path, save_model, monkeypatch
):
    options = Options(
        scale="small", seeds=(0, 1), store=str(tmp_path / "store"), dataset=judged.dataset
    )
    grid = cells.make_grid("noise", small, options, lambda one, other: 1.0)
    for cell in grid.cells:
        save_model(dataclasses.replace(judged, run=cell.training.path))
        Path(cell.path).mkdir(parents=True)
        Path(cell.path, "metrics.json").write_text("{}")
    monkeypatch.setattr(pace, "REPEATS", 1)
    pace.measure(grid)
    files = [Path(cell.path, pace.FILE) for cell in grid.cells]
    assert [file.exists() for file in files] == [True] * 4 + [False] * 4
    before = [file.read_bytes() for file in files[:4]]
    assert all(json.loads(content)["seconds"] > 0 for content in before)
    pace.measure(grid)
    assert before == [file.read_bytes() for file in files[:4]]
