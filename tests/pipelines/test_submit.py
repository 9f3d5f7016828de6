"""`layered submit` without a cluster: the line it prints, what it sends, what it refuses, and how it follows a job."""

import json
import os
import shlex
import signal
import subprocess
import types
import zipfile
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobStatus

from pipelines import cli, jobs, submit
from pipelines.commands import parse
from pipelines.errors import StageFailed, UserError

ROOT = str(Path(__file__).resolve().parents[2])
HEAD = "http://head:8265"
PATHS = ("--preset", "demo", "--run", "s3://b/run", "--dataset", "s3://b/data")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A shell that knows of no cluster."""
    before = signal.getsignal(signal.SIGTERM)
    for name in [name for name in os.environ if name.startswith(("RAY_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield
    signal.signal(signal.SIGTERM, before)


def described(*arguments: str) -> submit.Job:
    return submit.describe(submit.settle(vars(parse("submit", list(arguments)))))


def words(*arguments: str, wait: bool = False) -> list[str]:
    """The printed line, read as a shell would."""
    return shlex.split(described(*arguments).line({}, wait=wait))


def test_the_line_is_read_by_a_shell_as_what_is_sent() -> None:
    prompt = 'it\'s "a" $HOME cat; rm'
    job = described("sample", prompt, *PATHS, "--id", "a b")
    read = shlex.split(job.line({"RAY_API_SERVER_ADDRESS": HEAD}, wait=True))
    assert read[:4] == [f"RAY_API_SERVER_ADDRESS={HEAD}", "ray", "job", "submit"]
    assert read[read.index("--") + 1 :] == job.entrypoint
    assert job.entrypoint == ["python", "-m", "pipelines.sample", prompt, *PATHS]
    assert json.loads(read[read.index("--metadata-json") + 1]) == job.metadata
    assert read[read.index("--submission-id") + 1] == "a b"
    assert read[read.index("--working-dir") + 1] == ROOT
    assert "--no-wait" not in read
    assert "--no-wait" in words("train", *PATHS)


def test_options_of_the_stage_and_of_submit_mix_in_any_order() -> None:
    job = described(
        *("train", "seed=3", "--wait", *PATHS, "--env", "A=1", "train.num_images=9", "--id=x")
    )
    assert job.entrypoint[3:] == ["seed=3", *PATHS, "train.num_images=9"]
    assert (job.env, job.id) == ({"A": "1"}, "x")


def test_a_chain_is_one_shell_command_that_stops_at_the_first_failure(tmp_path) -> None:
    job = described("prepare,train,evaluate", *PATHS, "data.train_images=s3://b/it's here")
    assert job.entrypoint[:2] == ["bash", "-c"]
    stages = job.entrypoint[2].split(" && ")
    assert [shlex.split(stage)[2] for stage in stages] == [
        f"pipelines.{name}" for name in ("prepare", "train", "evaluate")
    ]
    assert all(shlex.split(stage)[-1] == "data.train_images=s3://b/it's here" for stage in stages)
    # Run in place of the stages: the second fails, and its code is that of the chain.
    (tmp_path / "python").write_text(
        '#!/bin/sh\necho "$2" >> done\ntest "$2" != pipelines.train || exit 7\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(shlex.join(job.entrypoint), shell=True, cwd=tmp_path, env=environment)
    assert ended.returncode == 7
    assert (tmp_path / "done").read_text().split() == ["pipelines.prepare", "pipelines.train"]


def test_metadata_says_what_it_is_and_nothing_of_the_environment() -> None:
    job = described("prepare,train", *PATHS, "--env", "COLOUR=mauve")
    known = {"stage": "prepare,train", "preset": "demo", "run": "s3://b/run"}
    assert known.items() <= job.metadata.items()
    assert set(job.metadata) <= {*known, "dataset", "version", "commit"}
    assert "mauve" not in job.line({}, wait=False) + json.dumps(job.metadata)
    assert all(isinstance(value, str) for value in job.metadata.values())


def test_a_value_is_sent_and_its_name_is_printed(monkeypatch) -> None:
    value = "http://127.0.0.1:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    job = described("train", *PATHS, "--env", "AWS_ENDPOINT_URL")
    assert job.runtime_env["env_vars"] == {"AWS_ENDPOINT_URL": value}
    line = job.line({}, wait=False)
    assert value not in line
    script = line.replace("ray job submit", "printf '%s\\n'", 1)
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    read = shown.stdout.splitlines()
    sent = json.loads(read[read.index("--runtime-env-json") + 1])
    assert sent == {"env_vars": {"AWS_ENDPOINT_URL": value}}
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    refused = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "AWS_ENDPOINT_URL" in refused.stderr


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "RAY_AUTH_TOKEN",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "DB_PASSWORD",
        "my_secret",
        "KEY",
        "APIKEY",
    ],
)
def test_names_that_look_like_secrets_are_refused(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "hush")
    with pytest.raises(UserError, match=f"--env {name}: .*dashboard") as caught:
        described("train", *PATHS, "--env", name)
    assert "hush" not in str(caught.value)
    with pytest.raises(UserError, match="dashboard"):
        described("train", *PATHS, "--env", f"{name}=hush")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_REGION", "HF_HOME", "MONKEY", "PATH"])
def test_other_names_are_not(name) -> None:
    assert described("train", *PATHS, "--env", f"{name}=x").env == {name: "x"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", *PATHS, "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: it is not set here"),
        (["train", *PATHS, "--env", "a-b=1"], "--env 'a-b' is no name"),
        (["train", *PATHS, "--env", "U=http://me:pw@h"], "--env U: its value is a URL with a pass"),
        (["serve", *PATHS], "'serve' is no stage that runs as a job; those are prepare, train"),
        (["train,sample", *PATHS], "train,sample: a chain is made of prepare, train, evaluate"),
        (["train,", *PATHS], "'' is no stage"),
        (["train"], "give --preset NAME"),
        (["train", *PATHS, "seed=x"], "seed: Value 'x'"),
        (["train", *PATHS, "--config", "elsewhere.yaml"], "--config='elsewhere.yaml' is no file of"),
        (["sample", "a cat", "--server", "http://x"], "--server draws without a cluster"),
        (["train", "--print-config", *PATHS], "--print-config and --dry-run of a stage"),
        ([], "give a stage: prepare, train"),
        (["train", *PATHS, "--follow", "x"], "--follow is of one job that was submitted earlier"),
        (["--stop", "x", "--follow", "y"], "--stop and --follow is of one job"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_sent(
    capsys, monkeypatch, tmp_path, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "connect", lambda address: pytest.fail("asked a cluster"))
    assert cli.main(["submit", *arguments, "--address", HEAD]) == 2
    shown = capsys.readouterr().err
    assert f"error: {message}" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("given", "variables", "message"),
    [
        (None, {}, "no cluster is named: give --address http://head:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS='10.0.0.1:6379' must be the URL"),
        ("head:8265", {}, "--address='head:8265' must be the URL"),
        ("http://head:port", {}, "--address='http://head:port' must be the URL"),
        ("ftp://me:pw@head", {}, "--address='ftp://...@head' must be the URL"),
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9: nobody answers"),
        ("http://me:pw@head:8265", {}, "--address with a password is seen"),
    ],
)
def test_an_address_is_named_and_answers(capsys, monkeypatch, given, variables, message) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    address = [] if given is None else ["--address", given]
    assert cli.main(["submit", "train", *PATHS, *address]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "pw" not in captured.err + captured.out


def test_an_address_that_is_given_counts_before_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://third:1")
    assert jobs.find_address(None) == ("http://third:1", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://second:1/")
    assert jobs.find_address(None) == ("http://second:1", "RAY_API_SERVER_ADDRESS")
    assert jobs.find_address(HEAD) == (HEAD, "--address")
    with jobs._named(HEAD):
        assert os.environ["RAY_API_SERVER_ADDRESS"] == HEAD
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://second:1/"


def test_a_configuration_of_the_source_travels_with_it(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    job = described("train", *PATHS, "--config", f"{ROOT}/ray_config.yaml")
    assert job.entrypoint[-2:] == ["--config", "ray_config.yaml"]
    assert described("train", *PATHS, f"--config={ROOT}/ray_config.yaml").entrypoint[-1] == (
        "--config=ray_config.yaml"
    )


def test_relative_paths_are_told_to_be_of_the_clusters_home(caplog, tmp_path, monkeypatch) -> None:
    caplog.set_level("INFO")
    described("prepare,train", "--preset", "demo", "--run", "/runs/1")
    (note,) = caplog.messages
    assert "home directory of Ray" in note
    assert note.endswith(" dataset=datasets/demo")
    caplog.clear()
    monkeypatch.chdir(tmp_path)
    assert described("evaluate", "--run", "runs/1").metadata["run"] == "runs/1"
    assert caplog.messages[-1].endswith(" run=runs/1")


def test_a_run_that_only_the_cluster_sees_is_checked_there(caplog) -> None:
    caplog.set_level("INFO")
    job = described("evaluate", "--run", "/only/there")
    assert job.metadata["run"] == "/only/there"
    assert "checked there" in caplog.text


def test_an_installed_package_sends_no_source(monkeypatch, capsys) -> None:
    monkeypatch.setattr(submit, "source_directory", lambda: None)
    job = described("train", *PATHS)
    assert job.runtime_env == {}
    assert "--working-dir" not in job.line({}, wait=False)
    assert cli.main(["submit", "train", *PATHS, "--pip", "--address", HEAD]) == 2
    assert "--pip takes versions from constraints.txt" in capsys.readouterr().err


def test_packages_are_those_of_the_project_held_to_the_constraints() -> None:
    constraints, *packages = described("train", *PATHS, "--pip").pip
    assert constraints.startswith("-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt # ")
    assert "torch>=2.13" in packages
    assert not any(package.startswith("ray") for package in packages)


def test_the_source_is_small_and_holds_what_a_job_needs(tmp_path) -> None:
    from ray._private.runtime_env.packaging import create_package

    create_package(ROOT, tmp_path / "source.zip", include_gitignore=True)
    names = set(zipfile.ZipFile(tmp_path / "source.zip").namelist())
    needed = {"ray_config.yaml", "constraints.txt", "pipelines/cli.py", "layered_model/unet.py"}
    assert needed <= names
    assert any(name.startswith("pipelines/emoji/") for name in names)
    unwanted = ("tests/", ".git/", "runs/", "datasets/", ".venv", "docs/")
    assert not [name for name in names if name.startswith(unwanted) or "__pycache__" in name]
    assert (tmp_path / "source.zip").stat().st_size < 10e6


class Client:
    """A job server's client with one job, whose log comes in parts; `lost` connections break after some."""

    def __init__(self, parts, code=0, status=None, lost=()) -> None:
        self.parts, self.code, self.lost = list(parts), code, list(lost)
        self.status = status or ("SUCCEEDED" if code == 0 else "FAILED")
        self.ended, self.sent, self.stopped = False, [], []

    def get_address(self) -> str:
        return HEAD

    def submit_job(self, **sent) -> str:
        self.sent.append(sent)
        return sent["submission_id"] or "job_1"

    def get_job_info(self, job):
        if job != "job_1":
            raise RuntimeError("Request failed with status code 404: Job does not exist.")
        status = JobStatus(self.status if self.ended else "RUNNING")
        code = self.code if self.ended else None
        return types.SimpleNamespace(status=status, driver_exit_code=code, message="a message")

    async def tail_job_logs(self, job):
        stop = self.lost.pop(0) if self.lost else None
        for number, part in enumerate(self.parts):
            if number == stop:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield part
        self.ended = True

    def get_job_logs(self, job) -> str:
        return "".join(self.parts)

    def stop_job(self, job) -> bool:
        self.stopped.append(job)
        self.ended, self.code, self.status = True, None, "STOPPED"
        return True


@pytest.fixture
def connected(monkeypatch):
    """Has `submit` meet this client."""

    def use(client: Client) -> Client:
        monkeypatch.setattr(jobs, "connect", lambda address: client)
        monkeypatch.setattr(jobs, "POLL_SECONDS", 0.0)
        return client

    return use


def test_what_is_sent_is_what_is_printed(connected, capsys) -> None:
    client = connected(Client([]))
    assert cli.main(["submit", "train", *PATHS, "--env", "A=1", "--address", HEAD]) == 0
    captured = capsys.readouterr()
    read = shlex.split(captured.out)
    (sent,) = client.sent
    assert sent["entrypoint"] == shlex.join(read[read.index("--") + 1 :])
    assert sent["metadata"] == json.loads(read[read.index("--metadata-json") + 1])
    assert sent["runtime_env"] == {"working_dir": ROOT, "env_vars": {"A": "1"}}


def test_what_to_do_next_is_told(connected, caplog) -> None:
    caplog.set_level("INFO")
    connected(Client([]))
    assert cli.main(["submit", "train", *PATHS, "--address", HEAD]) == 0
    assert f'follow="layered submit --follow job_1 --address {HEAD}"' in caplog.text
    assert f'stop="layered submit --stop job_1 --address {HEAD}"' in caplog.text


def test_a_dry_run_prints_and_sends_nothing(connected, capsys) -> None:
    client = connected(Client([]))
    assert cli.main(["submit", "train", *PATHS, "--dry-run", "--address", HEAD]) == 0
    assert "ray job submit" in capsys.readouterr().out
    assert client.sent == []


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        (0, None, 0),
        (2, None, 2),
        (7, None, 7),
        (-9, None, 137),
        (None, "FAILED", 1),
        (None, "STOPPED", 143),
    ],
)
def test_waiting_shows_the_log_and_exits_as_the_job(
    connected, capsys, code, status, expected
) -> None:
    connected(Client(["one\n", "two", " three\n"], code, status))
    assert cli.main(["submit", "train", *PATHS, "--wait", "--address", HEAD]) == expected
    assert capsys.readouterr().out.endswith("one\ntwo three\n")


def test_a_lost_connection_is_taken_up_where_it_broke(connected, capsys) -> None:
    connected(Client(["one\n", "two\n", "three\n"], lost=[1, 0, 2]))
    assert cli.main(["submit", "--follow", "job_1", "--address", HEAD]) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_connection_that_died_unnoticed_ends_with_the_job(connected, monkeypatch) -> None:
    class Dead(Client):
        async def tail_job_logs(self, job):
            import asyncio

            yield "one\n"
            self.ended = True
            await asyncio.sleep(3600)

    monkeypatch.setattr(jobs, "QUIET_SECONDS", 0.01)
    assert list(jobs.follow(connected(Dead(["one\n", "two\n"])), "job_1")) == ["one\n", "two\n"]


def test_a_server_that_stays_away_is_told(connected, monkeypatch) -> None:
    client = connected(Client(["one\n"], lost=[0]))

    def away(job):
        raise requests.ConnectionError

    monkeypatch.setattr(jobs, "LOST_SECONDS", 0.0)
    monkeypatch.setattr(client, "get_job_info", away)
    with pytest.raises(StageFailed, match="has not answered for 0 s"):
        list(jobs.follow(client, "job_1"))


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(connected, capsys) -> None:
    class Interrupted(Client):
        async def tail_job_logs(self, job):
            yield "one\n"
            raise KeyboardInterrupt

    client = connected(Interrupted([]))
    assert cli.main(["submit", "--follow", "job_1", "--address", HEAD]) == 130
    shown = capsys.readouterr().err
    assert f"layered submit --follow job_1 --address {HEAD}" in shown
    assert f"layered submit --stop job_1 --address {HEAD}" in shown
    assert client.stopped == []


def test_stop_waits_until_the_job_has_stopped(connected, caplog) -> None:
    caplog.set_level("INFO")
    client = connected(Client([]))
    assert cli.main(["submit", "--stop", "job_1", "--address", HEAD]) == 0
    assert client.stopped == ["job_1"]
    assert "job id=job_1 status=STOPPED" in caplog.text
    assert cli.main(["submit", "--stop", "job_1", "--address", HEAD]) == 0
    assert client.stopped == ["job_1"]  # it had stopped before


def test_a_job_that_is_not_there_is_a_mistake(connected, capsys) -> None:
    connected(Client([]))
    for option in ("--stop", "--follow"):
        assert cli.main(["submit", option, "nope", "--address", HEAD]) == 2
        assert f"there is no job 'nope' at {HEAD}" in capsys.readouterr().err


def test_a_refused_job_is_told_in_one_line(connected, capsys, monkeypatch) -> None:
    client = connected(Client([]))

    def refuse(**_):
        raise RuntimeError(
            "Request failed with status code 400: Traceback (most recent call last):\n"
            "ValueError: Job with submission_id x already exists."
        )

    monkeypatch.setattr(client, "submit_job", refuse)
    assert cli.main(["submit", "train", *PATHS, "--id", "x", "--address", HEAD]) == 2
    shown = capsys.readouterr().err
    assert "the job was not taken: ValueError: Job with submission_id x already exists" in shown
