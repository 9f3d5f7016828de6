"""Images/s of `train` beside a bare PyTorch loop on the same batches, in the same run.

The bare loop is in a process of its own without Ray: the same network, loss, optimizers and average, on batches that were made
before and are used again and again; no log, no checkpoint, no pictures. A run of `train` is the command itself, and counts from
the first line of its log to the last but one; no checkpoint, validation or grid falls into that time. All have as many threads in
all. Runs take turns, several rounds, with the bare loop between them; a run is compared with the mean of the two loops beside it,
and the median of the ratios counts, so that what else the machine does falls on both sides.
"""

import itertools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_float
from layered_model.loss import stratified_times
from pipelines import costs, loader
from pipelines.config import Config, UserError, from_yaml, load_config, to_yaml
from pipelines.costs import Spread
from pipelines.dataset import PreparedDataset
from pipelines.loader import Share
from pipelines.optimizers import make_optimizers
from pipelines.recipe import fresh_network, learning_rate, make_averages
from pipelines.session import event

logger = logging.getLogger(__name__)

NUM_BATCHES = 8
"""That the bare loop uses again and again."""
WARM_UP = 3
"""Steps of the bare loop that do not count."""
BARE_STEPS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    preset: str
    dataset: str | None
    "A prepared dataset; None prepares the preset's."
    num_images: int
    "Of each run that count."
    num_workers: tuple[int, ...]
    "Of each run."
    threads: int
    "Of all workers together."
    repeats: int
    "Rounds."
    overrides: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("num_images", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1"
                )
        for workers in self.num_workers:
            if workers < 1 or self.threads % workers:
                raise UserError(
                    f"--workers {workers} must divide --threads {self.threads}, so that all have as many"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Runs with one number of workers."""

    num_workers: int
    bare: list[float]
    "Images/s of the bare loop beside each run."
    train: list[float]
    "Images/s of each run."

    @property
    def ratio(self) -> Spread:
        """Of the runs to the bare loop."""
        return costs.ratio(self.train, self.bare)


def run(settings: Settings, output: str | None = None) -> list[Result]:
    """Measures, prints a line for each number of workers, and returns and writes everything.

    Raises:
        UserError: a setting of the preset cannot be, or there is no such dataset.
    """
    load_config(settings.preset, settings.overrides)
    results = [Result(num_workers=n, bare=[], train=[]) for n in settings.num_workers]
    with tempfile.TemporaryDirectory() as folder:
        dataset = settings.dataset or f"{folder}/dataset"
        if settings.dataset is None:
            _command("prepare", settings, [f"dataset={dataset}"])
        before = None
        for number, result in enumerate(settings.repeats * results):
            overrides = _overrides(
                settings, result.num_workers, [f"dataset={dataset}", f"run={folder}/{number}"]
            )
            config = load_config(settings.preset, overrides)
            before = before or bare(config, settings.threads)
            _command("train", settings, overrides)
            after = bare(config, settings.threads)
            result.bare.append((before + after) / 2)
            result.train.append(_speed(Path(config.run, "metrics.jsonl")))
            before = after
    about = [settings.preset, *settings.overrides, f"{settings.threads} threads", costs.processor()]
    lines = [f"train: {', '.join(about)}", _HEAD, *(_line(one, results[0]) for one in results)]
    sys.stdout.write("\n".join(lines) + "\n")
    if output is not None:
        everything = {"settings": asdict(settings), "runs": [asdict(one) for one in results]}
        Path(output).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return results


def _overrides(settings: Settings, num_workers: int, paths: Sequence[str]) -> list[str]:
    """Settings that make a run one of this benchmark."""
    batch_size = load_config(settings.preset, settings.overrides).train.batch_size
    part = -(-settings.num_images // (4 * batch_size)) * batch_size
    never = 100 * part
    return [
        *settings.overrides,
        f"train.num_workers={num_workers}",
        f"train.cpus_per_worker={settings.threads // num_workers}",
        # The first part does not count: it has the start in it, and the last the end.
        f"train.num_images={6 * part}",
        f"train.log_every_images={part}",
        f"train.checkpoint_every_images={never}",
        f"train.validate_every_images={never}",
        f"train.grid_every_images={never}",
        *paths,
    ]


def _command(stage: str, settings: Settings, overrides: Sequence[str]) -> None:
    module = f"pipelines.{stage}"
    command = [sys.executable, "-m", module, "--preset", settings.preset, *overrides]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"`layered {stage}` ended with exit code {code}")


def _speed(log: Path) -> float:
    """Images/s between the first line of a log and the last but one."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][1:-1]
    seconds = [1 / line["images_per_second"] for line in lines]  # of an image; parts are equal
    return len(seconds) / float(sum(seconds))


def bare(config: Config, threads: int) -> float:
    """Images/s of the bare loop, in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        speed = pool.submit(_loop, to_yaml(config), threads).result()
    del os.environ["OMP_NUM_THREADS"]
    event(logger, "bare", images_per_second=speed)
    return speed


def _loop(config_text: str, threads: int) -> float:
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

    began = 0.0
    for step in range(WARM_UP + BARE_STEPS):
        if step == WARM_UP:
            began = time.perf_counter()
        batch = batches[step % NUM_BATCHES]
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
                group["lr"] = learning_rate(train, step * size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(network)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return BARE_STEPS * size / seconds


_HEAD = "  workers  bare/s  train/s  train/bare (quartiles)  of the first"


def _line(result: Result, first: Result) -> str:
    ratio = result.ratio
    spread = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    bare, train = statistics.median(result.bare), statistics.median(result.train)
    share = ratio.median / first.ratio.median
    return f"{result.num_workers:9}  {bare:6.1f}  {train:7.1f}  {spread:>22}  {share:12.2f}"
