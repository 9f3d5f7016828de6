"""Runs what an experiment's cells need: prepare, train and evaluate as Ray jobs, side by side as far as there is room.

Every stage goes on where it was interrupted, and what is finished is not started, so the same command after any interruption goes
on. A stage that fails does not stop the others; what needs it is left out. Inside a job (`layered submit ablate`) nothing is
submitted: the stages are that job's own processes, so that whoever stops the job stops all of them. Called by `pipelines.ablate`.
"""

import contextlib
import dataclasses
import logging
import math
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines import jobs, stage_jobs, storage
from pipelines.ablation.grid import Grid, Training
from pipelines.config import Config
from pipelines.session import Needs, Progress, connect, event, in_job, resources, warning

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage with a configuration."""

    stage: str
    path: str
    "The directory that it makes, which no other task makes."
    config: Config
    finished: Callable[[], bool]
    needs: tuple[str, ...] = ()
    "Directories that must be finished before."

    def beside(self, ending: str) -> str:
        """Path of a file about it, outside of its directory, in which a stage may allow nothing else."""
        folder, _, name = self.path.rpartition("/")
        return storage.join(folder, "logs", f"{name}.{self.stage}.{ending}")


def tasks_of(grid: Grid) -> list[Task]:
    """All tasks of an experiment, each once: what is needed before what needs it, and cell by cell."""
    found: dict[str, Task] = {}

    def add(stage: str, config: Config, path: str, owner: Any, needs: tuple[str, ...] = ()) -> None:
        task = Task(
            stage=stage,
            path=path,
            config=config,
            finished=lambda: bool(owner.finished),
            needs=needs,
        )
        found.setdefault(path, task)

    def add_training(training: Training) -> None:
        needs = [training.dataset.path]
        if training.first is not None:
            add_training(training.first)
            needs.append(training.first.path)
        add("train", training.config, training.path, training, tuple(needs))

    for cell in grid.cells:
        dataset = cell.training.dataset
        add("prepare", dataset.config, dataset.path, dataset)
        add_training(cell.training)
        add("evaluate", cell.config, cell.path, cell, (cell.training.path,))
    return list(found.values())


class Running(Protocol):
    """A task that was started."""

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""

    def log(self) -> str:
        """All that it has said, once it has ended; is asked for once."""

    def stop(self) -> None:
        """Ends it."""


class Job:
    """A task as a Ray job.

    A local Ray's ends with it, and is not asked to: Ctrl-C on a terminal goes to its job server as well, which then answers no
    more.
    """

    def __init__(self, client: Any, task: Task, command: Sequence[str]) -> None:
        self._client = client
        self._id = jobs.submit(client, shlex.join(command), metadata={"stage": task.stage})

    def poll(self) -> int | None:
        """See `Running`."""
        info = jobs.info(self._client, self._id)
        return jobs.exit_code(info) if info.status.is_terminal() else None

    def log(self) -> str:
        """See `Running`."""
        return str(self._client.get_job_logs(self._id))

    def stop(self) -> None:
        """See `Running`."""
        if "RAY_ADDRESS" in os.environ:
            with contextlib.suppress(Exception):
                self._client.stop_job(self._id)


class Process:
    """A task as a process of this job."""

    def __init__(self, command: Sequence[str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT)

    def poll(self) -> int | None:
        """See `Running`."""
        code = self._process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def log(self) -> str:
        """See `Running`."""
        with self._output as output:
            output.seek(0)
            return output.read().decode(errors="replace")

    def stop(self) -> None:
        """See `Running`."""
        self._process.terminate()
        self._output.close()


Start = Callable[[Task], Running]


def run(tasks: Sequence[Task], parallel: int | None) -> dict[str, str]:
    """Runs what is not finished.

    Args:
        tasks: as `tasks_of` orders them.
        parallel: so many at one time; None for as many as there is room for.

    Returns:
        Directory -> why it could not be made.
    """
    waiting = [task for task in tasks if not task.finished()]
    event(logger, "ablate", stages=len(tasks), finished=len(tasks) - len(waiting))
    if not waiting:
        return {}
    if in_job():
        room = parallel or _room([task.config for task in waiting])
        return _run(tasks, room, lambda task: Process(_command(task)))
    config = waiting[0].config
    if "RAY_ADDRESS" not in os.environ:
        parallel = parallel or _room([task.config for task in waiting])
        config = _local(config, [task.config for task in waiting], parallel)
    with connect(config, Needs(stage="ablate"), dashboard=True) as context:
        client = jobs.connect(f"http://{context.dashboard_url}")
        room = parallel or _room([task.config for task in waiting], resources())
        return _run(tasks, room, lambda task: Job(client, task, _command(task)))


def _run(tasks: Sequence[Task], parallel: int, start: Start) -> dict[str, str]:
    """Starts tasks when what they need is there, and waits for all."""
    waiting = {task.path: task for task in tasks if not task.finished()}
    failed: dict[str, str] = {}
    running: dict[str, tuple[Task, Running, float]] = {}
    event(logger, "ablate", side_by_side=parallel)
    try:
        with Progress("ablate", len(tasks), "stages", len(tasks) - len(waiting)) as progress:
            while waiting or running:
                for task in _ready(waiting, running, failed)[: parallel - len(running)]:
                    del waiting[task.path]
                    event(logger, "start", stage=task.stage, path=task.path)
                    running[task.path] = (task, start(task), time.monotonic())
                for path in [
                    path for path, (_, job, _) in running.items() if job.poll() is not None
                ]:
                    task, job, began = running.pop(path)
                    seconds = time.monotonic() - began
                    if (cause := _ended(task, job)) is not None:
                        failed[path] = cause
                        warning(logger, "failed", stage=task.stage, path=path, cause=cause)
                    event(logger, "end", stage=task.stage, path=path, seconds=seconds)
                    progress.update(1, failed=len(failed))
                for task in _hopeless(waiting, failed):
                    del waiting[task.path]
                    need = next(need for need in task.needs if need in failed)
                    failed[task.path] = f"needs {need}, which failed"
                    progress.update(1, failed=len(failed))
                time.sleep(POLL_SECONDS if running else 0)
    except BaseException:
        for _, job, _ in running.values():
            job.stop()
        raise
    return failed


def _ready(waiting: dict[str, Task], running: dict[str, Any], failed: dict[str, str]) -> list[Task]:
    """Tasks that can begin, in order."""
    open_ = {*waiting, *running, *failed}
    return [task for task in waiting.values() if not open_ & set(task.needs)]


def _hopeless(waiting: dict[str, Task], failed: dict[str, str]) -> list[Task]:
    return [task for task in waiting.values() if set(failed) & set(task.needs)]


def _ended(task: Task, job: Running) -> str | None:
    """Keeps the log; says why the task failed, if it did."""
    log, code = job.log(), job.poll()
    path = task.beside("log")
    storage.write_atomically(path, log.encode())
    if code == 0:
        return None
    lines = [line for line in log.splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    cause = (said or lines or ["it said nothing"])[-1]
    return f"{task.stage} ended with {code}: {cause}; its log is {path}"


def _command(task: Task) -> list[str]:
    return stage_jobs.command(task.stage, stage_jobs.arguments(task.config, task.beside("yaml")))


def _cpus(config: Config) -> tuple[float, float]:
    """What a training and an evaluation reserve."""
    options = config.evaluate
    return (
        config.train.num_workers * config.train.cpus_per_worker,
        options.cpus_per_sampler + options.cpus_per_extractor + 1,
    )


def _room(configs: Sequence[Config], nodes: Sequence[Any] | None = None) -> int:
    """How many trainings fit on a cluster's nodes, or on this machine; at least one."""
    cpus = max(_cpus(config)[0] for config in configs)
    gpus = max(config.train.num_workers * int(config.train.use_gpu) for config in configs)
    if nodes is None:
        import torch

        nodes = [{"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}]
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    fits = total["CPU"] // cpus
    return max(1, int(min(fits, total["GPU"] // gpus) if gpus else fits))


def _local(config: Config, configs: Sequence[Config], parallel: int) -> Config:
    """A local Ray with logical CPUs for all that is to run side by side; a machine's own are shared out by the threads."""
    needed = math.ceil(parallel * max(max(_cpus(each)) for each in configs))
    ray = dataclasses.replace(config.ray, num_cpus=max(needed, config.ray.num_cpus or 0))
    return dataclasses.replace(config, ray=ray)
