"""`layered export`: a checkpoint's averaged weights as a model's directory, with the text encoder if that is asked for."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from layered_model import LayeredPipeline, checkpoint
from layered_model.text import describe
from pipelines import cli
from pipelines.checkpoints import Store


@pytest.fixture
def run(served, t5, tmp_path) -> Path:
    """A run with one checkpoint, whose text encoder has a relative path: ``tmp_path/encoder``."""
    shutil.copytree(t5, tmp_path / "encoder")
    config, weights, _ = checkpoint.load(str(served / "model"))
    state = {
        "model": asdict(replace(config, text=replace(config.text, name="encoder"))),
        "averages": [{"weights": weights}],
    }
    Store(str(tmp_path / "run" / "checkpoints")).write(32, state)
    return tmp_path / "run"


def drawn(path: Path) -> np.ndarray:
    pipeline = LayeredPipeline.from_pretrained(path)
    return np.asarray(pipeline("a red apple", seed=5, num_steps=2).images[32][0])


def test_a_model_with_its_text_encoder_draws_where_there_is_no_other(
    run, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "run", "--output", "named"]) == 0
    (tmp_path / "whole" / "text_encoder").mkdir(parents=True)
    (tmp_path / "whole" / "text_encoder" / "spiece.model").write_text("of an older one")
    assert cli.main(["export", "run", "--output", "whole", "--with-text-encoder"]) == 0
    expected = drawn(tmp_path / "named")
    assert not (tmp_path / "named" / "text_encoder").exists()

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert np.array_equal(drawn(tmp_path / "whole"), expected)
    with pytest.raises(ValueError, match="encoder"):
        drawn(tmp_path / "named")


def test_the_text_encoder_must_be_that_of_training(run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = describe("encoder", max_tokens=8).weights
    assert cli.main(["export", "run", "--with-text-encoder"]) == 2
    error = capsys.readouterr().err
    assert "--with-text-encoder: text encoder encoder has weights" in error
    assert other in error
    assert not (run / "model").exists()
