"""Stages as commands, and what became of one that ran as a Ray job.

Called by `demo` and `ablation`, which run several.
"""

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from pipelines import storage
from pipelines.config import Config, UserError, to_yaml

LOG_TAIL = 40
"""Lines of a log that are shown of a job that failed."""


class JobFailed(RuntimeError):
    """A stage ended with an error."""


def arguments(config: Config, path: str) -> list[str]:
    """Writes a resolved configuration as a file; returns the arguments that make a stage read it."""
    base = {k: v for k, v in yaml.safe_load(to_yaml(config)).items() if k != "preset"}
    content = yaml.safe_dump({"base": base, "presets": {config.preset: {}}}, sort_keys=False)
    storage.write_atomically(path, content.encode())
    return ["--config", path, "--preset", config.preset]


def command(stage: str, words: Sequence[str]) -> list[str]:
    """The command that runs a stage with these arguments."""
    return [sys.executable, "-m", f"pipelines.{stage}", *words]


def problem(stage: str, info: Any, log: str, path: str) -> Exception | None:
    """Why a job failed, as it is told; None where it did not.

    Args:
        stage: that it ran.
        info: Ray's `JobDetails` of the job, which has ended.
        log: all of its log.
        path: where that lies.
    """
    if info.driver_exit_code == 0:
        return None
    lines = log.splitlines()
    if info.driver_exit_code == 2 and (mistakes := [x for x in lines if x.startswith("error: ")]):
        return UserError(mistakes[-1].removeprefix("error: "))
    return JobFailed(
        f"{stage} failed ({info.message}); the end of {path}:\n" + "\n".join(lines[-LOG_TAIL:])
    )
