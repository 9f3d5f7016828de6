"""`layered submit` with a cluster of its own, which asks for a token: real jobs that end well, fail, and are stopped."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "OMP_NUM_THREADS": "1",
}
TIMEOUT = 120

TINY = (
    *("model.resolutions=[16,32]", "model.channels=[8,8,8]", "model.blocks=[1,1,1]"),
    *("model.attention=[0,1]", "model.embedding_width=16", "model.head_width=8"),
    *("model.text_width=24", "diffusion.reference_resolution=16", "sample.num_steps=2"),
    *("train.num_images=16", "train.batch_size=4", "train.num_workers=1", "train.warmup_images=4"),
    *("train.log_every_images=8", "train.num_validation_images=2", "train.trackers=[]"),
    *("train.cooldown_images=0", "data.max_reject_fraction=0.5", "text.num_actors=1"),
)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def shell() -> dict[str, str]:
    """Environment of a user who has the address and the token of a cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return kept | QUICK | token | {"PATH": programs, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def head(shell, descendants, kill) -> Iterator[str]:
    """The address of a cluster's job server."""
    folder = Path(
        tempfile.mkdtemp(prefix="j-", dir="/tmp")
    )  # Ray's sockets allow a short path only
    port, dashboard, agent, client = free_ports(4)
    command = [
        *("ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=4"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        *(f"--temp-dir={folder / 't'}", f"--object-store-memory={150 * 2**20}"),
    ]
    # Jobs get their source from the job, not from here.
    environment = {name: value for name, value in shell.items() if name != "PYTHONPATH"}
    with (folder / "log").open("wb") as log:
        ray = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        while "Ray runtime started" not in (folder / "log").read_text():
            assert ray.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        kill(*descendants(ray.pid), ray.pid)
        ray.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit(shell, head):
    """Runs `layered submit`; returns exit code, standard output and standard error."""

    def run(*arguments: str, **variables: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.submit", *arguments, "--address", head],
            env=shell | variables,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def arguments(coco, t5, tmp_path_factory) -> list[str]:
    """Of a small dataset and a short training."""
    folder = tmp_path_factory.mktemp("jobs")
    paths = {
        "data.train_annotations": coco / "captions_train.json",
        "data.train_images": coco / "train",
        "data.val_annotations": coco / "captions_val.json",
        "data.val_images": coco / "val",
        "text.encoder": t5,
    }
    ours = [f"{key}={json.dumps(str(value))}" for key, value in paths.items()]
    named = ["--preset", "demo", "--dataset", str(folder / "data"), "--run", str(folder / "run")]
    return [*named, *ours, *TINY]


def test_a_chain_runs_and_its_model_is_exported_by_the_line_as_printed(
    submit, arguments, shell, tmp_path
) -> None:
    code, out, err = submit("prepare,train", *arguments, "--wait")
    assert code == 0, out + err
    run = arguments[arguments.index("--run") + 1]
    last = out.splitlines()[-1]
    assert f"wrote run={run} model={run}/model" in last
    assert "exit_code=0" in err
    assert (Path(run) / "model/model.safetensors").is_file()

    model = tmp_path / 'it\'s a "model"'
    code, line, err = submit(
        *("export", run, "--output", str(model), "--env", "NOTE", "--wait", "--dry-run"),
        NOTE="some words",
    )
    assert code == 0, err
    done = subprocess.run(
        ["bash", "-c", line],
        env=shell | {"NOTE": "some words"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, line + done.stdout + done.stderr
    assert (model / "model.safetensors").is_file()


def test_a_mistake_that_only_the_stage_sees_ends_the_log_and_the_command(
    submit, arguments, tmp_path
) -> None:
    nowhere = f"data.train_images={tmp_path}/nowhere"
    other = ["--dataset", str(tmp_path / "data")]
    code, out, err = submit("prepare,train", *arguments, *other, nowhere, "--wait")
    assert code == 2, out + err
    (last,) = out.splitlines()[-1:]
    assert last.startswith("error: data.train_images=")
    assert "exit_code=2" in err
    assert "pipelines.train" not in out.split("Running entrypoint", 1)[-1].split("\n", 1)[-1]


def test_ctrl_c_leaves_a_job_running_and_stop_ends_it(submit, arguments, shell, head, tmp_path):
    long = ["--run", str(tmp_path / "run"), "train.num_images=1000000"]
    waiting = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipelines.submit", "train", *arguments, *long),
            *("--wait", "--id", "long", "--address", head),
        ],
        env=shell,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs in the background ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in waiting.stdout:
            if "ray joined=" in line:
                break
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate(timeout=TIMEOUT)
    finally:
        waiting.kill()
    assert waiting.returncode == 130, err
    assert "layered submit --follow long" in err

    code, out, err = submit("--stop", "long")
    assert code == 0, out + err
    assert "job id=long status=STOPPED" in err
    assert submit("--follow", "long")[0] == 143


def test_a_wrong_token_and_none_are_told_in_one_line(submit, arguments) -> None:
    code, _, err = submit("train", *arguments, RAY_AUTH_TOKEN="0" * 64)
    assert (code, err.count("\n")) == (2, 1), err
    assert "refuses the token; set RAY_AUTH_TOKEN" in err
    code, _, err = submit("--follow", "x", RAY_AUTH_MODE="disabled")
    assert (code, err.count("\n")) == (2, 1), err
    assert "asks for a token, and RAY_AUTH_MODE is disabled" in err
