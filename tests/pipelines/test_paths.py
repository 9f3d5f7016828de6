"""Which settings are paths, and what processes in other directories are told of them."""

import pytest

from pipelines import paths
from pipelines.config import load_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    return load_config(
        "demo",
        [
            *("dataset=data", "run=s3://bucket/run/", "train.grow_from=~/lower/model"),
            *("data.train_images=package:not_installed/x", "serve.keys_file=keys"),
            *("evaluate.clip_weights=openai/clip-vit-base-patch32", "text.encoder=weights"),
            "evaluate.extractor_weights=weights",
        ],
    )


def test_paths_are_made_absolute_and_names_are_left(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    placed = paths.placed(config)
    assert placed.dataset == str(tmp_path / "data")
    assert placed.run == "s3://bucket/run"
    assert placed.train.grow_from == "/home/somebody/lower/model"
    assert placed.data.train_images == "package:not_installed/x", "the same everywhere"
    assert placed.serve.keys_file == str(tmp_path / "keys")
    assert placed.evaluate.extractor_weights == str(tmp_path / "weights")
    assert placed.evaluate.clip_weights == "openai/clip-vit-base-patch32"
    assert placed.evaluate.references is None
    assert placed.text.encoder == "weights"


def test_a_stage_uses_its_own_paths(config) -> None:
    assert paths.used("prepare", config).keys() >= {"dataset", "text.encoder", "data.train_images"}
    assert "run" not in paths.used("prepare", config)
    assert paths.used("train", config)["train.grow_from"] == "~/lower/model"
    evaluate = paths.used("evaluate", config)
    assert "data.train_images" not in evaluate
    assert evaluate["evaluate.extractor_weights"] == "weights"
    assert "evaluate.clip_weights" not in evaluate, "a name"
    assert "evaluate.references" not in evaluate, "null"


@pytest.mark.parametrize("key", [*paths.PATHS, *paths.PATHS_OR_NAMES])
def test_every_key_is_one_of_the_configuration(config, key: str) -> None:
    value = paths._get(config, key)
    assert value is None or isinstance(value, str)
