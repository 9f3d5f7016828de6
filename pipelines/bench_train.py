"""Images/s of `train` beside a bare PyTorch loop on the same pictures, in the same run.

The bare loop is a process of its own without Ray: the same network, loss, optimizers and average, on batches that were made
before and are used again and again; no log, no checkpoint, no pictures. The run of `train` is the command itself, with its Ray
and a line of log every ten steps; checkpoints, validation and grids do not fall into the time. Both have as many threads in all.

They take turns of some seconds: while one works, all processes of the other are stopped (SIGSTOP), so that what else the machine
does falls on both sides, and what Ray does in the background on its own. Needs Linux.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_float
from layered_model.loss import stratified_times
from pipelines import costs, loader
from pipelines.config import Config, UserError, from_yaml, load_config, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.loader import Share
from pipelines.optimizers import make_optimizers
from pipelines.processes import family, send
from pipelines.recipe import fresh_network, learning_rate, make_averages

NUM_BATCHES = 8
"""That the bare loop uses again and again."""
WARM_UP = 5
"""Steps that do not count."""
LOG_STEPS = 10
TURN_SECONDS = 8.0
START_SECONDS = 300.0
"""The longest that a start may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    preset: str
    dataset: str | None
    "A prepared dataset; None prepares the preset's."
    num_workers: tuple[int, ...]
    "Of each run."
    threads: int
    "Of all workers together."
    turns: int
    "Of the run, and of the bare loop."
    overrides: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("threads", "turns"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        for workers in self.num_workers:
            if workers < 1 or self.threads % workers:
                raise UserError(
                    f"--workers {workers} must divide --threads {self.threads}, so that all have as many"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run."""

    num_workers: int
    bare: float
    "Images/s of the bare loop."
    train: float
    "Images/s of the run."

    @property
    def ratio(self) -> float:
        """Of the run to the bare loop."""
        return self.train / self.bare


def run(settings: Settings, output: str | None = None) -> list[Result]:
    """Measures, prints a line for each number of workers, and returns and writes everything.

    Raises:
        UserError: a setting of the preset cannot be, there is no such dataset, or a run ended early.
    """
    load_config(settings.preset, settings.overrides)
    about = [settings.preset, *settings.overrides, f"{settings.threads} threads", costs.processor()]
    sys.stdout.write(f"train: {', '.join(about)}\n{_HEAD}\n")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = settings.dataset or f"{folder}/dataset"
        if settings.dataset is None:
            command = _command("prepare", settings.preset, settings.overrides, dataset)
            if subprocess.run(command, check=False).returncode:
                raise UserError("`layered prepare` failed")
        for number, workers in enumerate(settings.num_workers):
            changes = _overrides(settings, workers, f"{folder}/{number}")
            config = load_config(settings.preset, [*changes, f"dataset={dataset}"])
            command = _command("train", settings.preset, changes, dataset)
            with _bare(config, settings.threads) as bare, _training(command, config) as train:
                results.append(_take_turns(workers, train, bare, settings.turns))
            sys.stdout.write(_line(results[-1], results[0]) + "\n")
            sys.stdout.flush()
    if output is not None:
        everything = {"settings": asdict(settings), "runs": [asdict(one) for one in results]}
        Path(output).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return results


def _command(stage: str, preset: str, overrides: Sequence[str], dataset: str) -> list[str]:
    module = f"pipelines.{stage}"
    return [sys.executable, "-m", module, "--preset", preset, *overrides, f"dataset={dataset}"]


def _overrides(settings: Settings, num_workers: int, run_directory: str) -> list[str]:
    """Settings that make a run one of this benchmark; it goes on until it is stopped."""
    batch_size = load_config(settings.preset, settings.overrides).train.batch_size
    never = 10**9
    return [
        *settings.overrides,
        f"run={run_directory}",
        f"train.num_workers={num_workers}",
        f"train.cpus_per_worker={settings.threads // num_workers}",
        f"train.num_images={never}",
        f"train.log_every_images={LOG_STEPS * batch_size}",
        f"train.checkpoint_every_images={never}",
        f"train.validate_every_images={never}",
        f"train.grid_every_images={never}",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A process that trains, with those it started."""

    pid: int
    num_images: Callable[[], int]
    "Pictures so far, as far as they are told."
    is_alive: Callable[[], bool]

    def send(self, signal_number: int) -> None:
        """Sends a signal to all its processes."""
        send(family(self.pid), signal_number)

    def turn(self, seconds: float, *, to_the_line: bool = False) -> float:
        """Lets it work for so long, or a little longer, until more pictures are told; returns the seconds."""
        began = time.perf_counter()
        self.send(signal.SIGCONT)
        time.sleep(seconds)
        if to_the_line:
            before = self.num_images()
            while self.num_images() == before and self.is_alive():
                time.sleep(0.01)
        self.send(signal.SIGSTOP)
        return time.perf_counter() - began

    def wait(self, num_images: int) -> None:
        """Waits until it has trained on so many.

        Raises:
            UserError: it ended, or takes too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.num_images() < num_images:
            if not self.is_alive():
                raise UserError("the training to be measured ended before it could be")
            if time.monotonic() > deadline:
                raise UserError(f"nothing was trained in {START_SECONDS:g} seconds")
            time.sleep(0.2)


def _take_turns(num_workers: int, train: Contestant, bare: Contestant, turns: int) -> Result:
    both = (train, bare)
    for contestant in both:
        contestant.turn(0.0, to_the_line=True)
    first = [contestant.num_images() for contestant in both]
    seconds = [0.0, 0.0]
    for turn in range(1, turns + 1):
        for which, contestant in enumerate(both):
            # From line to line, all turns together; a single one may end anywhere between.
            seconds[which] += contestant.turn(TURN_SECONDS, to_the_line=turn == turns)
    done = [contestant.num_images() for contestant in both]
    train.send(signal.SIGCONT)  # or it could not end
    speeds = [(b - a) / s for a, b, s in zip(first, done, seconds, strict=True)]
    return Result(num_workers=num_workers, train=speeds[0], bare=speeds[1])


@contextlib.contextmanager
def _training(command: Sequence[str], config: Config) -> Iterator[Contestant]:
    log = Path(config.run, "metrics.jsonl")

    def num_images() -> int:
        lines = log.read_bytes().splitlines() if log.exists() else []
        return int(json.loads(lines[-1])["images"]) if lines else 0

    process = subprocess.Popen(command)
    try:
        contestant = Contestant(
            pid=process.pid, num_images=num_images, is_alive=lambda: process.poll() is None
        )
        contestant.wait(WARM_UP * config.train.batch_size)
        yield contestant
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _bare(config: Config, threads: int) -> Iterator[Contestant]:
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    process = context.Process(target=_loop, args=(to_yaml(config), threads, count), daemon=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    process.start()
    del os.environ["OMP_NUM_THREADS"]
    try:
        assert process.pid is not None
        contestant = Contestant(
            pid=process.pid, num_images=lambda: int(count.value), is_alive=process.is_alive
        )
        contestant.wait(WARM_UP * config.train.batch_size)
        contestant.send(signal.SIGSTOP)
        yield contestant
    finally:
        process.kill()
        process.join()


def _loop(config_text: str, threads: int, count: Any) -> None:
    """Trains until it is killed, and counts pictures."""
    torch.set_num_threads(threads)
    config = from_yaml(config_text)
    train, dataset = config.train, PreparedDataset.open(config.dataset)
    device = torch.device("cuda" if train.use_gpu else "cpu")
    share = Share(seed=0, batch_size=train.batch_size, text_dropout=train.text_dropout)
    with closing(loader.batches(dataset, "train", share)) as reader:
        batches = list(itertools.islice(reader, NUM_BATCHES))
    network = fresh_network(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    diffusion = LayeredDiffusion(config.diffusion, config.model.layers)
    optimizers, (average, _) = make_optimizers(network, train), make_averages(network, train)
    generator = torch.Generator().manual_seed(0)
    size, channels = train.batch_size, config.model.picture_channels

    def draw(resolution: int) -> torch.Tensor:
        noise = torch.randn(size, channels, resolution, resolution, generator=generator)
        return noise.to(device)

    for batch in itertools.cycle(batches):
        t = stratified_times(0, size, size, generator).to(device)
        eps = diffusion.noise(draw)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bfloat16"):
            loss = diffusion.loss(
                network,
                to_float(batch.pictures.to(device)),
                eps,
                t,
                batch.text.to(device, torch.float32),
                batch.text_mask.to(device),
            )
        torch.autograd.backward(loss.total)
        float(nn.utils.clip_grad_norm_(network.parameters(), train.grad_clip))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, count.value)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(network)
        if device.type == "cuda":
            torch.cuda.synchronize()
        count.value += size


_HEAD = "  workers  bare/s  train/s  train/bare  of the first run"


def _line(result: Result, first: Result) -> str:
    return (
        f"{result.num_workers:9}  {result.bare:6.1f}  {result.train:7.1f}  {result.ratio:10.3f}"
        f"  {result.ratio / first.ratio:16.2f}"
    )
