"""From the embedded pictures to a scored model, every stage a Ray job, as on a cluster.

Starts a local Ray with its job server, submits prepare, train, evaluate and sample one after the other, turns their progress
lines into bars, and ends with where the pictures are, the scores, and what to try next. A stage whose result is there already
says so and ends, so the same command after an interruption goes on where it was. Logs are in ``RUN/logs``.

Inside a job (`layered submit demo`) it submits nothing: the stages are its own processes, one after the other, so that whoever
follows or stops the job does so with all of them. Run by `cli`.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines import jobs, score_report, stage_jobs, storage
from pipelines.config import Config
from pipelines.dataset import PreparedDataset
from pipelines.runs import step_split
from pipelines.schema import RunDir
from pipelines.session import Needs, Progress, connect, event, in_job

logger = logging.getLogger(__name__)

PROMPT = "a soccer ball on a yellow background"
_PROGRESS = re.compile(
    r"progress stage=(?P<stage>\S+) done=(?P<done>\d+) total=(?P<total>\d+) unit=(?P<unit>\S+)"
    r" seconds_left=\S+(?P<fields>.*)"
)


def check(config: Config) -> list[str]:
    """Says what would be done."""
    how = "one after the other in this job" if in_job() else "as jobs of a local Ray"
    return [
        f"prepare {storage.absolute(config.dataset)}, then train, evaluate and sample in "
        f"{storage.absolute(config.run)}, {how}"
    ]


def run(config: Config) -> None:
    """Runs all stages, or what is left of them.

    Raises:
        UserError: a stage found a mistake of the user's.
        stage_jobs.JobFailed: a stage failed.
    """
    layout = RunDir(storage.absolute(config.run))
    storage.require_writable(layout.path, "run")
    began = time.monotonic()
    if in_job():
        with tempfile.TemporaryDirectory(prefix="demo-") as folder:
            for stage, arguments in _stages(config, layout, folder):
                _run_here(stage, arguments)
    else:
        with connect(config, Needs(stage="demo"), dashboard=True) as context:
            client = jobs.connect(f"http://{context.dashboard_url}")
            for stage, arguments in _stages(config, layout, layout.path):
                _run_job(client, stage, arguments, layout)
    _tell(config, layout, time.monotonic() - began)
    event(logger, "wrote", run=layout.path, dataset=storage.absolute(config.dataset))


def _stages(config: Config, layout: RunDir, folder: str) -> Iterator[tuple[str, list[str]]]:
    """Each stage with its arguments; all read the one resolved configuration, written into the folder."""
    common = stage_jobs.arguments(config, storage.join(folder, "demo.yaml"))
    common += ["--run", layout.path, "--dataset", storage.absolute(config.dataset)]
    for stage in ("prepare", "train", "evaluate"):
        yield stage, common
    yield "sample", [PROMPT, *common]


def _run_here(stage: str, arguments: Sequence[str]) -> None:
    """Runs one stage as a process of this job, into whose log it writes; ends with its exit code where that is not 0."""
    event(logger, "demo", stage=stage)
    with subprocess.Popen(stage_jobs.command(stage, arguments)) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # Ray tells all processes of a job that is stopped; others may not
            raise
    if code:
        # It has said why. No more words: a job's log ends with its cause.
        raise SystemExit(code if code > 0 else 128 - code)


def _run_job(client: Any, stage: str, arguments: Sequence[str], layout: RunDir) -> None:
    """Submits one stage and follows it to its end.

    An interruption stops the job. A local Ray's ends with it, and is not asked to: Ctrl-C on a terminal goes to its job
    server as well, which then answers no more.
    """
    command = shlex.join(stage_jobs.command(stage, arguments))
    job = jobs.submit(client, command, metadata={"stage": stage})
    event(logger, "job", stage=stage, id=job)
    try:
        log = _follow(client, job)
    except BaseException:
        if "RAY_ADDRESS" in os.environ:
            with contextlib.suppress(Exception):
                client.stop_job(job)
        raise
    path = f"{layout.path}/logs/{stage}.log"
    storage.write_atomically(path, log.encode())
    problem = stage_jobs.problem(stage, jobs.info(client, job), log, path)
    if problem is not None:
        raise problem


def _follow(client: Any, job: str) -> str:
    """Waits for a job, showing the last progress line of its log as a bar; returns the log."""
    log = ""
    with contextlib.ExitStack() as stack:
        bar: Progress | None = None
        for text in jobs.follow(client, job):
            begun = log.rpartition("\n")[2]  # of a line that had not come to its end
            log += text
            for line in _PROGRESS.finditer((begun + text).rpartition("\n")[0]):
                done = int(line["done"])
                if bar is None:
                    bar = Progress(line["stage"], int(line["total"]), line["unit"], done)
                    stack.enter_context(bar)
                if done > bar.done:
                    fields = dict(part.split("=", 1) for part in shlex.split(line["fields"]))
                    bar.update(done - bar.done, **fields)
    return log


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
