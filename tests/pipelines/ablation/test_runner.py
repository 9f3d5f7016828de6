"""The order of stages, side by side or not, and what one that fails does to the others: with processes in place of Ray jobs."""

import dataclasses
import sys
import time
from pathlib import Path

import pytest

from pipelines.ablation import cells, runner
from pipelines.ablation.grid import Options
from pipelines.ablation.runner import Process, Task
from pipelines.config import load_config


@pytest.fixture(scope="module")
def config():
    return load_config("demo")


@pytest.fixture
def make(tmp_path, config):
    """Makes tasks: `script` runs in Python in the task's directory, after which a file says that it is finished."""

    def of(name: str, *needs: str, script: str = "") -> tuple[Task, str]:
        path = tmp_path / name
        path.mkdir()
        task = Task(
            stage="train",
            path=str(path),
            config=config,
            finished=(path / "done").exists,
            needs=tuple(str(tmp_path / need) for need in needs),
        )
        return task, f"import os, pathlib, sys, time\nos.chdir({str(path)!r})\n{script}\n" + (
            "pathlib.Path('done').touch()"
        )

    return of


class Starts:
    """Starts each task's script, and remembers the order."""

    def __init__(self, *made: tuple[Task, str]) -> None:
        self.tasks = [task for task, _ in made]
        self.scripts = {task.path: script for task, script in made}
        self.names: list[str] = []
        self.running: list[Process] = []

    def __call__(self, task: Task) -> Process:
        self.names.append(Path(task.path).name)
        self.running.append(Process([sys.executable, "-c", self.scripts[task.path]]))
        return self.running[-1]

    def run(self, parallel: int) -> dict[str, str]:
        failed = runner._run(self.tasks, parallel, self)
        return {Path(path).name: cause for path, cause in failed.items()}


def test_what_is_needed_comes_first_whatever_the_room(make):
    check = "assert pathlib.Path('../a/done').exists()"
    starts = Starts(make("a"), make("b", "a", script=check), make("c", "a", "b", script=check))
    assert starts.run(parallel=3) == {}
    assert starts.names == ["a", "b", "c"]


def test_two_run_side_by_side_and_never_three(make):
    """Each of a pair waits for the other to be there; a third sees that nobody is running when it is started."""
    meet = "\n".join(
        [
            "pathlib.Path('here').touch()",
            "other = pathlib.Path('../{}/here')",
            "end = time.monotonic() + 60",
            "while not other.exists() and time.monotonic() < end: time.sleep(0.01)",
            "assert other.exists()",
        ]
    )
    alone = "assert pathlib.Path('../a/done').exists() or pathlib.Path('../b/done').exists()"
    starts = Starts(
        make("a", script=meet.format("b")),
        make("b", script=meet.format("a")),
        make("c", script=alone),
    )
    assert starts.run(parallel=2) == {}
    assert starts.names == ["a", "b", "c"]


def test_one_that_fails_stops_only_what_needs_it(make):
    starts = Starts(
        make("a", script="sys.exit('error: this and that')"),
        make("b", "a"),
        make("c", "b"),
        make("d"),
    )
    failed = starts.run(parallel=1)
    assert starts.names == ["a", "d"]
    assert "train ended with 1: this and that; its log is " in failed["a"]
    assert failed["b"].endswith("/a, which failed")
    assert failed["c"].endswith("/b, which failed")
    assert "d" not in failed


def test_without_an_error_line_the_last_words_are_the_cause(make):
    script = (
        "print('first'); print('the end'); print(); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    failed = Starts(make("a", script=script)).run(parallel=1)
    assert "train ended with 137: the end" in failed["a"]


def test_logs_are_kept(make, tmp_path):
    Starts(make("a", script="print('hello')")).run(parallel=1)
    assert (tmp_path / "logs" / "a.train.log").read_text() == "hello\n"


def test_what_is_finished_is_not_started_again(make):
    starts = Starts(make("a"), make("b", "a"))
    starts.run(parallel=1)
    again = Starts()
    again.tasks, again.scripts = starts.tasks, starts.scripts
    assert again.run(parallel=1) == {}
    assert again.names == []


def test_an_interruption_ends_what_runs_and_the_same_call_goes_on(make):
    starts = Starts(make("a", script="time.sleep(600)"), make("b"))

    def interrupted(task: Task) -> Process:
        if starts.names:
            raise KeyboardInterrupt
        return starts(task)

    with pytest.raises(KeyboardInterrupt):
        runner._run(starts.tasks, 2, interrupted)
    (process,) = starts.running
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() == 128 + 15
    starts.scripts[starts.tasks[0].path] = starts.scripts[starts.tasks[0].path].replace("600", "0")
    assert starts.run(parallel=2) == {}
    assert starts.names == ["a", "a", "b"]


def test_tasks_of_a_grid_are_there_once_and_in_order(small):
    grid = cells.make_grid("x", small, Options(scale="small", seeds=(0, 1)), lambda one, other: 1.0)
    tasks = runner.tasks_of(grid)
    stages = [task.stage for task in tasks]
    assert stages.count("prepare") == 1
    assert stages.count("train") == 4  # two kinds of noise, two seeds
    assert stages.count("evaluate") == 8
    assert len({task.path for task in tasks}) == len(tasks)
    seen: set[str] = set()
    for task in tasks:
        assert set(task.needs) <= seen
        seen.add(task.path)


@pytest.mark.parametrize(
    ("workers", "gpu", "nodes", "room"),
    [
        (1, False, [{"CPU": 8}], 8),
        (2, False, [{"CPU": 8}, {"CPU": 4}], 6),
        (3, False, [{"CPU": 2}], 1),
        (1, True, [{"CPU": 64, "GPU": 4}], 4),
        (2, True, [{"CPU": 64, "GPU": 8}], 4),
        (1, True, [{"CPU": 2, "GPU": 8}], 2),
    ],
)
def test_as_many_run_side_by_side_as_there_is_room_for(config, workers, gpu, nodes, room):
    train = dataclasses.replace(
        config.train, num_workers=workers, cpus_per_worker=1.0, use_gpu=gpu, batch_size=32 * workers
    )
    assert runner._room([dataclasses.replace(config, train=train)], nodes) == room
