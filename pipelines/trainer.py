"""The training loop of one worker, under Ray Train.

Everything random is a function of (seed, pictures seen, rank): order and captions in `loader`, which need no rank, times, noise
and dropout in `recipe`. A checkpoint is therefore weights, averaged weights, optimizer and a few numbers, and a run that was
interrupted goes on as if it had not been. Rank 0 alone keeps the averaged weights and writes to the run's directory, and what it
cannot do all workers learn of, or they would wait for it in vain. Called by `train`.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig
from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_float
from layered_model.unet import Network, make_network
from pipelines import loader, snapshots, storage, validation
from pipelines.checkpoints import Rule, Store, Writer, copied, newest
from pipelines.config import Config, from_yaml, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.loader import Batch, Share
from pipelines.losses import LossByNoise
from pipelines.optimizers import make_optimizers
from pipelines.recipe import (
    draw_chance,
    fresh_network,
    learning_rate,
    make_averages,
    model_config,
    peak_images_per_second,
)
from pipelines.runlog import MetricsLog, Stopwatch, memory, write_environment
from pipelines.running_score import RunningScore
from pipelines.schema import RunDir
from pipelines.session import event, setup_logging, warning
from pipelines.workers import agreed, gradients_kept, leaving_nodes, on_device, parallel

logger = logging.getLogger(__name__)


def run_worker(arguments: dict[str, Any]) -> str | None:
    """What Ray Train runs in each worker: ``config`` as YAML, ``dataset`` path.

    Returns:
        Why training stopped before its end. Another worker in this one's place could do no better, so it is no failure.
    """
    setup_logging()
    config = from_yaml(arguments["config"])
    try:
        with closing(Worker(config, PreparedDataset.open(config.dataset))) as worker:
            worker.train()
    except Stopped as stopped:
        return str(stopped)
    return None


class Stopped(Exception):
    """Training cannot go on, and all workers know it; the text tells the user why."""


class Worker:
    """One process of data-parallel training."""

    def __init__(self, config: Config, dataset: PreparedDataset) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.dataset = config, dataset
        self.layout = RunDir(storage.absolute(config.run))
        self.device = ray.train.torch.get_device()
        self.num_images = self.num_skipped = 0
        self.validation_loss: float | None = None
        self.leaving = False
        torch.manual_seed(config.seed)
        network = fresh_network(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = parallel(network, static=config.train.accumulation_steps == 1)
        self.network: Network = network
        self.step_model: Any = torch.compile(self.model) if config.train.compile else self.model
        self.diffusion = LayeredDiffusion(config.diffusion, config.model.layers)
        self.optimizers = make_optimizers(self.network, config.train)
        self.ema, self.tracked = make_averages(self.network, config.train)
        self.averages = list({id(a): a for a in (self.ema, *self.tracked)}.values())
        self.losses = LossByNoise(self.diffusion.resolutions, self.device)
        self.checkpoints, self.writer = Store(self.layout.checkpoints), Writer()
        self.score: RunningScore | None = None
        if config.train.score_every_images:
            self.score = RunningScore(config, dataset, self.device)
        self._restore()
        self.log: MetricsLog | None = None
        if self.rank == 0:
            self.log = MetricsLog(self.layout, self.num_images, config.train.trackers)
            write_environment(self.layout, self.device, self.world_size)
            self.peak_speed = peak_images_per_second(config, self.device, self.world_size)

    def train(self) -> None:
        """Trains to ``train.num_images``, then rank 0 writes the model's directory."""
        train = self.config.train
        share = Share(
            seed=self.config.seed,
            batch_size=train.batch_size,
            text_dropout=train.text_dropout,
            rank=self.rank,
            world_size=self.world_size,
            first=self.num_images,
            num_threads=max(1, int(train.cpus_per_worker)),
        )
        with closing(loader.batches(self.dataset, "train", share)) as reader:
            self._train(on_device(reader, self.device))
        self._lead(self._export)

    def close(self) -> None:
        """Waits until everybody who is told of the run knows all of it."""
        if self.log is not None:
            self.log.close()

    def _train(self, reader: Iterator[Batch]) -> None:
        train = self.config.train
        stopwatch, logged, began = Stopwatch(), self.num_images, time.perf_counter()
        norm = math.nan
        while self.num_images < train.num_images:
            with stopwatch.time("data"):
                batch = next(reader)
            with stopwatch.time("model"):
                terms = self._backward(batch)
            with stopwatch.time("optimizer"):
                norm = self._step(terms)
            before, self.num_images = self.num_images, self.num_images + train.batch_size
            done = self.num_images >= train.num_images
            crossed = functools.partial(_crossed, before=before, after=self.num_images)
            if done or crossed(train.validate_every_images):
                with stopwatch.time("validation"):
                    self._validate()
            if self.score and (done or crossed(train.score_every_images)):
                with stopwatch.time("score"):
                    self._lead(self._score, together=True)
            if crossed(train.grid_every_images) and not done:
                with stopwatch.time("samples"):
                    self._lead(self._draw_grid)
            if done or crossed(train.checkpoint_every_images):
                with stopwatch.time("checkpoint"):
                    self._save(wait=done)
            if done or crossed(train.log_every_images):
                speed = (self.num_images - logged) / (time.perf_counter() - began)
                self._log(norm, speed, stopwatch.take())
                if not done:
                    self._prepare_to_leave()
                logged, began = self.num_images, time.perf_counter()

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of one batch.

        Returns:
            The reference's logsnr [b] and the loss of each layer and picture [layers, b], for the log.
        """
        train, local = self.config.train, len(batch.pictures)
        t, eps, crop = draw_chance(
            self.config,
            self.diffusion,
            seen=self.num_images,
            rank=self.rank,
            count=local,
            device=self.device,
        )
        per_picture = []
        size = local // train.accumulation_steps
        for start in range(0, local, size):
            part = slice(start, start + size)
            with (
                gradients_kept(self.model, local - start > size),
                torch.autocast(
                    self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"
                ),
            ):
                loss = self.diffusion.loss(
                    self.step_model,
                    to_float(batch.pictures[part].to(self.device)),
                    [layer[part] for layer in eps],
                    t[part],
                    batch.text[part].to(self.device, torch.float32),
                    batch.text_mask[part].to(self.device),
                    crop=crop,
                )
                torch.autograd.backward(loss.total / train.accumulation_steps)
            per_picture.append(loss.per_picture)
        return self.diffusion.logsnr_ref(t), torch.cat(per_picture, dim=1)

    def _step(self, terms: tuple[Tensor, Tensor]) -> float:
        """One optimizer step, or none where the gradient is not finite; returns its norm before clipping."""
        train = self.config.train
        # Reading the norm waits for the device once a step, and keeps what is not a number out of the weights.
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), train.grad_clip))
        if math.isfinite(norm):
            self.losses.add(*terms)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, self.num_images)
                optimizer.step()
        else:
            self._skip()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.rank == 0:
            for average in self.averages:
                average.update(self.network)
        return norm

    def _skip(self) -> None:
        """Counts a step that is left out. The gradient is the mean of all workers', and so is the decision."""
        self.num_skipped += 1
        if self.rank == 0:
            warning(
                logger,
                "skipped_step",
                reason="the gradient is not finite",
                images=self.num_images,
                skipped=self.num_skipped,
                allowed=self.config.train.max_skipped_steps,
            )
        if self.num_skipped > self.config.train.max_skipped_steps:
            raise Stopped(
                f"{self.num_skipped} steps had a gradient that is not finite, the last after "
                f"{self.num_images} pictures, and train.max_skipped_steps="
                f"{self.config.train.max_skipped_steps} allows no more; {self._newest()}; a lower "
                "train.learning_rate may help"
            )

    def _newest(self) -> str:
        with suppress(OSError):
            self.writer.check(wait=True)
        return newest(self.layout)

    def _lead(self, action: Callable[[], None], *, together: bool = False) -> None:
        """Rank 0 does something with the run's directory. Where that fails all workers stop, not one alone.

        Args:
            action: what may fail on rank 0.
            together: the others have a part in it, whose failures they tell rank 0 (`share_out`).
        """
        problem = None
        if self.rank == 0 or together:
            try:
                action()
            except OSError as error:
                if self.rank > 0:
                    raise
                problem = (
                    f"run={self.config.run!r}: {error}; training stopped after {self.num_images} "
                    f"pictures; {self._newest()}, from which the same command goes on"
                )
        if (problem := agreed(problem)) is not None:
            raise Stopped(problem)

    def _log(self, norm: float, images_per_second: float, times: dict[str, float]) -> None:
        """Adds one line to rank 0's log."""
        values = (
            self.losses.take()
            | times
            | {
                "grad_norm": norm,
                "learning_rate": self.optimizers[0].param_groups[0]["lr"],
                "images_per_second": images_per_second,
                "skipped_steps": float(self.num_skipped),
                "num_workers": float(self.world_size),
            }
            | memory(self.device)
        )

        def add() -> None:
            self.writer.check()
            assert self.log is not None
            values["utilization"] = images_per_second / self.peak_speed
            values["ema_decay"] = self.ema.beta(max(1, self.ema.num_updates))
            self.log.add(self.num_images, values)

        self._lead(add)

    def _validate(self) -> None:
        """Rank 0 measures the averaged weights on fixed pictures."""
        if not validation.num_rows(self.config, self.dataset):
            return

        def measure() -> None:
            assert self.log is not None
            found = validation.validation_loss(
                self.config, self.dataset, self._averaged().to(self.device), self.device
            )
            self.validation_loss = found["val/loss"]
            self.log.add(self.num_images, found)

        self._lead(measure)

    def _score(self) -> None:
        """All workers draw with the averaged weights, and rank 0 logs how far that is from the validation split."""
        assert self.score is not None
        found = self.score.measure(self._averaged(), self.num_images)
        if self.log is not None:
            self.log.add(self.num_images, found)

    def _draw_grid(self) -> None:
        """Draws fixed captions from the averaged weights."""
        assert self.log is not None
        if self.dataset.num_images(validation.SPLIT):
            config = model_config(self.config, self.dataset, self.num_images)
            sheet = validation.draw_grid(config, self.dataset, self._averaged(), self.device)
            self.log.add_grid(self.num_images, sheet)

    def _averaged(self) -> Network:
        network = make_network(self.config.model)
        network.load_state_dict(self.ema.weights)
        return network

    def _save(self, *, wait: bool) -> None:
        """Rank 0 begins to write a checkpoint, from a copy, while training goes on."""

        def begin() -> None:
            self.writer.check(wait=True)  # before a copy is made: there are never two
            write = functools.partial(self._write, self.num_images, copied(self._state()))
            self.writer.submit(write)
            if wait:
                self.writer.check(wait=True)

        self._lead(begin)

    def _prepare_to_leave(self) -> None:
        """Writes a checkpoint, once, when a node of these workers is about to be taken away."""
        if not self.leaving and (nodes := leaving_nodes()):
            self.leaving = True
            if self.rank == 0:
                warning(logger, "leaving", nodes=",".join(nodes), next="a checkpoint is written")
            self._save(wait=True)

    def _state(self) -> dict[str, Any]:
        return {
            "config": to_yaml(self.config),
            "model": asdict(model_config(self.config, self.dataset, self.num_images)),
            "num_images": self.num_images,
            "num_skipped": self.num_skipped,
            "validation_loss": self.validation_loss,
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "averages": [average.state_dict() for average in self.averages],
        }

    def _write(self, num_images: int, state: dict[str, Any]) -> None:
        """In the writer's thread."""
        train = self.config.train
        kept = [
            (average.relative_width, state["averages"][self.averages.index(average)]["weights"])
            for average in self.tracked
        ]
        snapshots.save(self.layout, ModelConfig.from_dict(state["model"]), kept)
        self.checkpoints.write(num_images, state, state["validation_loss"])
        rule = Rule(
            num_newest=train.num_checkpoints_kept,
            every_images=train.keep_checkpoints_every_images,
            best=train.keep_best_checkpoint,
        )
        self.checkpoints.prune(rule)

    def _restore(self) -> None:
        """Goes on from the newest checkpoint that is sound, on all workers from the same."""
        state = self.checkpoints.read_newest(self.device) if self.rank == 0 else None
        num_images = agreed(None if state is None else int(state["num_images"]))
        if num_images is None:
            return
        if state is None:
            state = self.checkpoints.read(num_images, self.device)
        self.num_images, self.num_skipped = num_images, state["num_skipped"]
        self.validation_loss = state["validation_loss"]
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(**saved)
        if self.rank == 0:
            path = self.checkpoints.path(num_images)
            event(logger, "resumed", images=num_images, checkpoint=path, workers=self.world_size)

    def _export(self) -> None:
        config = model_config(self.config, self.dataset, self.num_images)
        for name, content in checkpoint.encode(config, self.ema.weights).items():
            storage.write_atomically(storage.join(self.layout.model, name), content)
        event(logger, "exported", model=self.layout.model)


def _crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
