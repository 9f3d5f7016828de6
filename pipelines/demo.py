"""From the embedded pictures to a scored model, every stage a Ray job, as on a cluster.

Starts a local Ray with its job server, submits prepare, train, evaluate and sample one after the other, turns their progress
lines into bars, and ends with where the pictures are, the scores, and what to try next. A stage whose result is there already
says so and ends, so the same command after an interruption goes on where it was. Logs are in ``RUN/logs``. Run by `cli`.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from pipelines import score_report, storage
from pipelines.config import Config, UserError, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.runs import step_split
from pipelines.schema import RunDir
from pipelines.session import Needs, Progress, connect, event

logger = logging.getLogger(__name__)

PROMPT = "a soccer ball on a yellow background"
POLL_SECONDS = 0.5
AGENT_SECONDS = 60.0
LOG_TAIL = 40
_PROGRESS = re.compile(
    r"progress stage=(?P<stage>\S+) done=(?P<done>\d+) total=(?P<total>\d+) unit=(?P<unit>\S+)"
    r" seconds_left=\S+(?P<fields>.*)"
)


class JobFailed(RuntimeError):
    """A stage ended with an error."""


def check(config: Config) -> list[str]:
    """Says what would be done."""
    return [
        f"prepare {storage.absolute(config.dataset)}, then train, evaluate and sample in "
        f"{storage.absolute(config.run)}, as jobs of a local Ray"
    ]


def run(config: Config) -> None:
    """Runs all stages, or what is left of them.

    Raises:
        UserError: a stage found a mistake of the user's.
        JobFailed: a stage failed.
    """
    layout = RunDir(storage.absolute(config.run))
    storage.require_writable(layout.path, "run")
    began = time.monotonic()
    with connect(config, Needs(stage="demo"), dashboard=True) as context:
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(f"http://{context.dashboard_url}")
        for stage, arguments in _stages(config, layout):
            _run_job(client, stage, arguments, layout)
    _tell(config, layout, time.monotonic() - began)


def _stages(config: Config, layout: RunDir) -> Iterator[tuple[str, list[str]]]:
    """Each stage with its arguments; all read the one resolved configuration."""
    base = {k: v for k, v in yaml.safe_load(to_yaml(config)).items() if k != "preset"}
    path = storage.join(layout.path, "demo.yaml")
    content = yaml.safe_dump({"base": base, "presets": {config.preset: {}}}, sort_keys=False)
    storage.write_atomically(path, content.encode())
    common = ["--config", path, "--preset", config.preset, "--run", layout.path]
    common += ["--dataset", storage.absolute(config.dataset)]
    for stage in ("prepare", "train", "evaluate"):
        yield stage, common
    yield "sample", [PROMPT, *common]


def _run_job(client: Any, stage: str, arguments: Sequence[str], layout: RunDir) -> None:
    """Submits one stage and follows it to its end.

    An interruption stops the job. A local Ray's ends with it, and is not asked to: Ctrl-C on a terminal goes to its job
    server as well, which then answers no more.
    """
    command = [sys.executable, "-m", f"pipelines.{stage}", *arguments]
    job = _submit(client, shlex.join(command), stage)
    event(logger, "job", stage=stage, id=job)
    try:
        log = _follow(client, job)
    except BaseException:
        if "RAY_ADDRESS" in os.environ:
            with contextlib.suppress(Exception):
                client.stop_job(job)
        raise
    storage.write_atomically(f"{layout.path}/logs/{stage}.log", log.encode())
    info = client.get_job_info(job)
    if info.driver_exit_code == 0:
        return
    lines = log.splitlines()
    if info.driver_exit_code == 2 and (mistakes := [x for x in lines if x.startswith("error: ")]):
        raise UserError(mistakes[-1].removeprefix("error: "))
    raise JobFailed(
        f"{stage} failed ({info.message}); the end of {layout.path}/logs/{stage}.log:\n"
        + "\n".join(lines[-LOG_TAIL:])
    )


def _submit(client: Any, entrypoint: str, stage: str) -> str:
    """Submits a job; a Ray that has just started may need a while before its agent takes any."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, metadata={"stage": stage}))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise UserError(
                    "demo: Ray takes no jobs, as when another Ray on this machine holds port 52365; "
                    "stop that one first"
                ) from error
            time.sleep(POLL_SECONDS)


def _follow(client: Any, job: str) -> str:
    """Waits for a job, showing the last progress line of its log as a bar; returns the log."""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        while True:
            ended = client.get_job_status(job).is_terminal()
            log: str = client.get_job_logs(job)
            lines = list(_PROGRESS.finditer(log))
            if lines:
                line = lines[-1]
                if bar is None:
                    first = int(lines[0]["done"])
                    bar = Progress(line["stage"], int(line["total"]), line["unit"], first)
                    stack.enter_context(bar)
                if int(line["done"]) > bar.done:
                    fields = dict(part.split("=", 1) for part in shlex.split(line["fields"]))
                    bar.update(int(line["done"]) - bar.done, **fields)
            if ended:
                return log
            time.sleep(POLL_SECONDS)


def _tell(config: Config, layout: RunDir, seconds: float) -> None:
    """The last words: pictures, scores, and the next commands."""
    result = json.loads(storage.read_bytes(layout.scores))
    num_images = PreparedDataset.open(config.dataset).num_images("train")
    sys.stdout.write(
        f"""
{score_report.table(result)}
Trained on {num_images} pictures, {config.train.num_images} views; all in all {seconds:.0f} seconds.
A training step: {step_split(layout)}.

Captions of the validation split and what the model drew, at every resolution:
  {layout.grid}
All scores, with the pictures, on one page:
  {layout.evaluation_html}
Samples: {layout.samples}    TensorBoard, logs, metrics: {layout.path}

Next:
  layered sample "a rocket on a pink background" --run {config.run} --seed 7
  layered train --run {config.run} train.num_images={2 * config.train.num_images}     # goes on: twice as long
  layered evaluate --run {config.run} sample.guidance=1.5     # less obedient, more varied
"""
    )


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["demo", *sys.argv[1:]]))
