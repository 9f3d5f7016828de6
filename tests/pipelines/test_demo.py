"""The demo inside a job: its stages are processes of that job, one after the other."""

import sys
from pathlib import Path

import pytest

from pipelines import cli, demo, jobs
from pipelines.config import load_config


@pytest.fixture
def in_job(monkeypatch):
    """As Ray starts the processes of a job."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(jobs, "connect", lambda address: pytest.fail("submits jobs of its own"))


@pytest.fixture
def stages(monkeypatch, tmp_path) -> Path:
    """Stands in for the stages, writes down which ran; the third fails with code 3."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho "$2 $*" >> {tmp_path}/ran\ntest "$2" != pipelines.evaluate || exit 3\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path / "ran"


def test_stages_run_one_after_the_other_and_the_first_failure_ends_it(in_job, stages, tmp_path):
    config = load_config("demo", [f"run={tmp_path}/run", f"dataset={tmp_path}/data"])
    with pytest.raises(SystemExit) as caught:
        demo.run(config)
    assert caught.value.code == 3
    lines = stages.read_text().splitlines()
    assert [line.split()[0] for line in lines] == [
        f"pipelines.{name}" for name in ("prepare", "train", "evaluate")
    ]
    assert all(f"--run {tmp_path}/run --dataset {tmp_path}/data" in line for line in lines)


def test_it_writes_where_files_stay(in_job, stages, monkeypatch, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["demo", "--run", "runs/here"])
    paths = f"--run {tmp_path}/home/runs/here --dataset {tmp_path}/home/datasets/demo"
    assert all(paths in line for line in stages.read_text().splitlines())
    assert not list(copy.iterdir())
