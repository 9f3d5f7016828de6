"""`layered sample` on a small random model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import cli, sample
from pipelines.config import UserError, to_yaml

pytestmark = pytest.mark.usefixtures("toy_prompts")


def _pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_every_resolution_of_every_picture_is_a_file_that_says_what_it_is(trained, capsys) -> None:
    config = dataclasses.replace(trained, seed=7)
    paths = sample.run(config, "A red  apple, größer!", num_images=2)
    names = [f"a-red-apple-größer-{seed}-{r}px.png" for r in (16, 32) for seed in (7, 8)]
    names.append("a-red-apple-größer-7-sheet.png")
    assert paths == [str(Path(config.run, "samples", name)) for name in names]
    assert capsys.readouterr().out.split() == paths
    for path, seed, resolution in zip(paths, "7878", (16, 16, 32, 32), strict=False):
        with Image.open(path) as picture:
            assert picture.size == (resolution, resolution)
            facts = dict(picture.text)
        assert facts["prompt"] == "A red  apple, größer!"
        assert (facts["seed"], facts["num_steps"], facts["guidance"]) == (seed, "2", "2.0")
        assert len(facts["model_sha256"]) == 64


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(trained, tmp_path) -> None:
    batches = dataclasses.replace(trained.evaluate, batch_size=2)
    config = dataclasses.replace(trained, seed=3, evaluate=batches)
    many = sample.run(config, "a cat", num_images=3, output=str(tmp_path / "many"))
    later = dataclasses.replace(config, seed=5)
    one = sample.run(later, "a cat", num_images=1, output=str(tmp_path / "one"))
    same = {Path(path).name: path for path in many}
    for path in one[:-1]:
        difference = _pixels(path).astype(int) - _pixels(same[Path(path).name])
        assert np.abs(difference).max() <= 1
    assert len({_pixels(path).tobytes() for path in many[:3]}) == 3


def test_the_command_line_draws_with_the_configuration_of_the_run(trained, tmp_path) -> None:
    Path(trained.run, "config.yaml").write_text(to_yaml(trained))
    command = ["sample", "a cat", "--run", trained.run, "--seed", "11", "--num-images", "1"]
    assert cli.main([*command, "--num-steps", "1", "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "a-cat-11-32px.png") as picture:
        assert picture.text["num_steps"] == "1"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
        ("日本 語", "日本-語"),
        ("word " * 1000, "word-word-word-word-word-word-word-word"),
    ],
)
def test_a_file_name_is_short_and_stays_in_its_folder(prompt: str, name: str) -> None:
    assert sample.slug(prompt) == name


def test_a_models_own_directory_draws_with_a_presets_settings(trained, tmp_path, capsys) -> None:
    model = Path(trained.run, "model").rename(tmp_path / "exported")
    words = ["a red apple", "--run", str(model), "--num-images", "1", "sample.num_steps=2"]
    assert cli.main(["sample", *words]) == 2
    assert "is a model's directory, without the settings of a run: give --preset" in (
        capsys.readouterr().err
    )
    assert cli.main(["sample", *words, "--preset", "demo"]) == 0
    assert (model / "samples" / "a-red-apple-0-32px.png").exists()


def test_a_run_without_a_model_says_what_makes_one(trained, tmp_path) -> None:
    empty = dataclasses.replace(trained, run=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"nothing/model.*`layered train --preset demo --run"):
        sample.run(empty, "a cat")


def test_no_pictures_are_refused(trained) -> None:
    with pytest.raises(UserError, match="num_images=0 must be at least 1"):
        sample.run(trained, "a cat", num_images=0)
