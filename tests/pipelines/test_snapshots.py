"""`pipelines.snapshots`: averages of another width, from the directory of a run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from layered_model import LayeredPipeline, LayeredUNet, checkpoint
from layered_model.ema import PowerEMA
from pipelines import cli, export, snapshots
from pipelines.config import UserError
from pipelines.schema import RunDir

BATCH, EVERY = 8, 160


@pytest.fixture
def run(trained):
    """A run that kept two widths five times, and the average of a third tracked beside."""
    model = checkpoint.load(f"{trained.run}/model")[0]
    network = LayeredUNet(trained.model)
    averages = [PowerEMA(network, width) for width in (0.05, 0.1)]
    third = PowerEMA(network, 0.08)
    generator = torch.Generator().manual_seed(0)
    layout = RunDir(str(trained.run))
    for num_images in range(BATCH, 5 * EVERY + 1, BATCH):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for average in (*averages, third):
            average.update(network)
        if num_images % EVERY == 0:
            kept = dataclasses.replace(model, num_images_trained=num_images)
            weights = [(average.relative_width, average.weights) for average in averages]
            snapshots.save(layout, kept, weights)
    return trained.run, averages, third


def test_another_width_is_made_from_what_a_run_kept(run) -> None:
    path, (narrow, wide), third = run
    made = LayeredPipeline.from_pretrained(export.run(path, ema_width=0.08))
    assert made.config.num_images_trained == 5 * EVERY
    for name, weight in made.network.state_dict().items():
        apart = (narrow.weights[name] - wide.weights[name]).norm()
        assert (weight - third.weights[name]).norm() <= 0.1 * apart, name


def test_a_tracked_width_comes_back(run) -> None:
    path, (narrow, _), _ = run
    made = LayeredPipeline.from_pretrained(export.run(path, ema_width=0.05))
    for name, weight in made.network.state_dict().items():
        torch.testing.assert_close(weight, narrow.weights[name], rtol=1e-4, atol=1e-4)


def test_an_unfinished_snapshot_is_left_out(run) -> None:
    path, *_ = run
    before = export.run(path, ema_width=0.08)
    weights = LayeredPipeline.from_pretrained(before).weights_sha256
    Path(path, "snapshots/000000000999_0.05").mkdir()
    assert (
        LayeredPipeline.from_pretrained(export.run(path, ema_width=0.08)).weights_sha256 == weights
    )


def test_a_run_without_snapshots_says_how_to_keep_them(trained) -> None:
    with pytest.raises(UserError, match=r"train with train.ema_snapshot_widths=\[0.05,0.1\]"):
        export.run(trained.run, ema_width=0.08)


def test_an_impossible_width_is_told(run, capsys) -> None:
    path, *_ = run
    assert cli.main(["export", path, "--ema-width", "0.5"]) == 2
    assert capsys.readouterr().err.startswith("error: --ema-width 0.5: ")
    assert not Path(path, "model_0.5").exists()
