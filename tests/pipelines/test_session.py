"""The session: what fits, which paths are safe, how Ray is told, and what a log line looks like."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import session
from pipelines.config import UserError, load_config
from pipelines.session import Needs, Progress, check_paths, check_resources, connect, event

TWO_CPUS = [{"CPU": 2.0}]


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "nodes"),
    [
        (2, 1, 0, [{"CPU": 3.0}]),
        (0, 1, 0, [{"CPU": 1.0}]),
        (1, 0.5, 0, [{"CPU": 1.5}]),
        (2, 8, 0, [{"CPU": 8.0}, {"CPU": 8.0}, {"CPU": 1.0}]),
        (2, 1, 1, [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}]),
    ],
)
def test_what_fits_is_let_through(workers, cpus, gpus, nodes) -> None:
    needs = Needs(stage="train", workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    check_resources(needs, nodes)


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "nodes", "why"),
    [
        (2, 1, 0, TWO_CPUS, "Ray Data starves"),
        (1, 3, 0, TWO_CPUS, "too large a worker"),
        (1, 1, 1, TWO_CPUS, "no GPU"),
        (1, 6, 0, [{"CPU": 4.0}, {"CPU": 4.0}], "enough in all, on no single node"),
        (2, 1, 1, [{"CPU": 8.0, "GPU": 1.0}, {"GPU": 1.0}], "a GPU without a CPU beside it"),
    ],
)
def test_what_would_hang_is_refused_in_one_sentence(workers, cpus, gpus, nodes, why) -> None:
    needs = Needs(stage="train", workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    with pytest.raises(UserError, match=rf"^train: {workers} workers of {cpus} CPU.*ask for fewer"):
        check_resources(needs, nodes)


def test_local_paths_on_several_nodes_need_a_promise(monkeypatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    check_paths(["runs/a"], several_nodes=False, shared=False)
    check_paths(["runs/a"], several_nodes=True, shared=True)
    check_paths(["s3://bucket/a", "package:pipelines/emoji"], several_nodes=True, shared=False)
    with pytest.raises(UserError, match=r"'runs/a' is a local path.*several nodes.*shared_paths"):
        check_paths(["runs/a"], several_nodes=True, shared=False)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A home without Ray's token, and an environment without Ray's variables."""
    monkeypatch.setattr(session, "_refresh_imported_ray", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [*session.ENVIRONMENT, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return os.environ


def test_a_local_ray_gets_a_token_of_its_own(environment, tmp_path) -> None:
    session.set_environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert list(tmp_path.iterdir()) == []


def test_joining_follows_the_token_that_lies_in_the_home_directory(environment, tmp_path) -> None:
    environment["RAY_ADDRESS"] = "10.0.0.1:6379"
    session.set_environment()
    assert environment.pop("RAY_AUTH_MODE") == "disabled"
    assert "RAY_AUTH_TOKEN" not in environment
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    session.set_environment()
    assert environment["RAY_AUTH_MODE"] == "token"


def test_what_the_user_set_stands(environment) -> None:
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_DATA_USE_DATASOURCE_V2": "1"}
    session.set_environment()
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in environment
    assert environment["RAY_DATA_USE_DATASOURCE_V2"] == "1"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.ray
def test_connect_finds_a_running_ray_and_leaves_it_running(local_ray) -> None:
    import ray

    config = load_config("demo")
    with connect(config, Needs(stage="train", workers=2)):
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
    assert ray.is_initialized()
    with (
        pytest.raises(UserError, match="evaluate: 4 workers of 1 CPU each"),
        connect(config, Needs(stage="evaluate", workers=4)),
    ):
        pass


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Not pytest's: Ray's sockets allow a short path only."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(tmp_path, temporary):
    """Starts a script in a shell of its own, which knows nothing of the tests' Ray."""
    ignored = ("RAY_", "OMP_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ignored)}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TMPDIR"] = str(temporary)

    def start(script: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.ray
def test_a_job_of_a_private_ray_joins_that_one_whatever_else_runs(start, tmp_path) -> None:
    script = """
import pathlib, sys, time
from pipelines import jobs
from pipelines.config import load_config
from pipelines.session import Needs, connect
mine, other = map(pathlib.Path, sys.argv[1:])
with connect(load_config("demo", ["ray.num_cpus=1"]), Needs(stage="demo"), dashboard=True) as context:
    mine.touch()
    while not other.exists():
        time.sleep(0.1)
    client = jobs.connect(f"http://{context.dashboard_url}")
    job = jobs.submit(client, "bash -c 'echo joins $RAY_ADDRESS'", metadata={})
    log = "".join(jobs.follow(client, job))
    assert f"joins {context.address_info['gcs_address']}\\n" in log, (context.address_info, log)
    mine.unlink()
    while other.exists():
        time.sleep(0.1)
"""
    names = [str(tmp_path / name) for name in ("one", "other")]
    processes = [start(script, *names), start(script, *reversed(names))]
    try:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.terminate()  # one waits for the other
            process.communicate()


@pytest.mark.ray
def test_connect_starts_a_private_ray_and_ends_it_when_terminated(start, temporary) -> None:
    script = """
import os, pathlib, signal, sys, time
import ray, ray.data
from pipelines.config import load_config
from pipelines.session import Needs, connect
config = load_config("demo", ["ray.num_cpus=3"])
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
try:
    with connect(config, Needs(stage="train", workers=2)):
        assert ray.cluster_resources()["CPU"] == 3
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
        assert ray.data.DataContext.get_current().use_datasource_v2 is False
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
except SystemExit as left:
    assert left.code == 143, left.code
assert not ray.is_initialized()
assert not pathlib.Path("~/.ray").expanduser().exists()
"""
    process = start(script)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "SIGTERM" not in err
    assert not list(temporary.iterdir())


def test_an_event_is_one_line_of_keys_and_values(caplog) -> None:
    with caplog.at_level(logging.INFO):
        event(
            logging.getLogger("x"), "saved", path="a b", loss=0.123456, num=3, empty="", text="l\nn"
        )
    assert caplog.messages == ['saved path="a b" loss=0.1235 num=3 empty="" text="l\\nn"']


@pytest.fixture
def lines(caplog, monkeypatch):
    """Progress lines as dictionaries; the clock stands still unless moved."""
    clock = {"now": 0.0}
    monkeypatch.setattr(session.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)

    def parsed() -> list[dict[str, str]]:
        return [
            dict(part.split("=") for part in message.split()[1:])
            for message in caplog.messages
            if message.startswith("progress ")
        ]

    return clock, parsed


def test_progress_says_first_last_and_at_most_every_five_seconds(lines) -> None:
    clock, parsed = lines
    with Progress("train", 100, "images") as progress:
        for _ in range(10):
            clock["now"] += 1.0
            progress.update(10, loss=0.5)
    assert [line["done"] for line in parsed()] == ["0", "50", "100"]
    assert parsed()[1] == {
        "stage": "train",
        "done": "50",
        "total": "100",
        "unit": "images",
        "seconds_left": "5",
        "loss": "0.5",
    }


def test_progress_of_a_resumed_run_does_not_count_earlier_work_as_speed(lines) -> None:
    clock, parsed = lines
    with Progress("train", 100, "images", done=80) as progress:
        assert progress.seconds_left() is None
        clock["now"] += 10.0
        progress.update(10)
        assert progress.seconds_left() == 10.0
    assert [line["done"] for line in parsed()] == ["80", "90"]


def test_progress_of_a_failed_stage_does_not_claim_an_end(lines) -> None:
    _, parsed = lines

    def fail() -> None:
        with Progress("train", 100, "images") as progress:
            progress.update(10)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [line["done"] for line in parsed()] == ["0"]
