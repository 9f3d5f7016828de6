"""The training loop of one worker, under Ray Train.

Everything random is a function of (seed, pictures seen, rank): order and captions in `loader`, which need no rank, times and
noise here. A checkpoint is therefore weights, averaged weights, optimizer and one number, and a run that was interrupted goes on
as if it had not been. Rank 0 alone keeps the averaged weights, the log and the grids of samples; all ranks meet in
``ray.train.report``. Called by `train`.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.crop import Box
from layered_model.diffusion import LayeredDiffusion
from layered_model.ema import DecayEMA, PowerEMA
from layered_model.growth import grow
from layered_model.images import to_float
from layered_model.loss import stratified_times
from layered_model.pipeline import LayeredPipeline
from layered_model.text import EncoderInfo, pad
from layered_model.unet import LayeredUNet, Network, make_network
from pipelines import loader, snapshots, storage
from pipelines.config import Config, from_yaml, to_yaml
from pipelines.dataset import PreparedDataset, text_of, text_rows
from pipelines.grid import contact_sheet, png_bytes
from pipelines.loader import Batch, Share
from pipelines.losses import LossByNoise
from pipelines.optimizers import make_optimizers
from pipelines.schema import CAPTIONS, TEXT, TEXT_LENGTHS, RunDir
from pipelines.sections import TrainConfig
from pipelines.session import event, setup_logging

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
GRID_CAPTIONS = 8


def run_worker(arguments: dict[str, Any]) -> None:
    """What Ray Train runs in each worker: ``config`` as YAML, ``dataset`` path."""
    setup_logging()
    config = from_yaml(arguments["config"])
    Worker(config, PreparedDataset.open(arguments["dataset"])).train()


@dataclass
class Stopwatch:
    """Seconds by activity since the last reset."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        """Adds the time spent inside to an activity."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[activity] = self.seconds.get(activity, 0.0) + spent

    def take(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        taken, self.seconds = self.seconds, {}
        return taken


def model_config(config: Config, dataset: PreparedDataset, num_images: int) -> ModelConfig:
    """What is saved beside the weights."""
    made = dataset.manifest.settings
    return ModelConfig(
        network=config.model,
        diffusion=config.diffusion,
        text=EncoderInfo(
            name=made.encoder,
            weights=made.encoder_weights,
            width=made.text_width,
            max_tokens=made.max_tokens,
        ),
        sampling=SamplingDefaults(
            sampler=config.sample.sampler,
            num_steps=config.sample.num_steps,
            guidance=config.sample.guidance,
        ),
        num_images_trained=num_images,
    )


def fresh_network(config: Config) -> Network:
    """What training starts from: new weights, or those of a trained model with fewer resolutions."""
    if config.train.grow_from is None:
        network = make_network(config.model)
    else:
        model, weights, _ = checkpoint.load(storage.absolute(config.train.grow_from))
        lower = LayeredUNet(model.network)
        lower.load_state_dict(weights)
        network = grow(lower, config.model)
    network.checkpoint_upper = config.train.checkpoint_upper_layers
    return network


def random_crop(config: Config, generator: torch.Generator) -> Box | None:
    """Where this step trains the layers above the trunk; None for everywhere."""
    if config.train.crop_resolution is None:
        return None
    lowest, highest = config.model.resolutions[0], config.model.resolutions[-1]
    side = config.train.crop_resolution * lowest // highest
    top, left = torch.randint(lowest - side + 1, (2,), generator=generator).tolist()
    return Box(top, left, side, side)


class Worker:
    """One process of data-parallel training."""

    def __init__(self, config: Config, dataset: PreparedDataset) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.dataset = config, dataset
        self.layout = RunDir(storage.absolute(config.run))
        self.device = ray.train.torch.get_device()
        self.num_images = 0
        torch.manual_seed(config.seed)
        network = fresh_network(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: nn.Module = ray.train.torch.prepare_model(network)
        self.network: Network = getattr(self.model, "module", self.model)
        self.diffusion = LayeredDiffusion(config.diffusion, config.model.layers)
        self.optimizers = make_optimizers(self.network, config.train)
        train = config.train
        self.tracked = {width: PowerEMA(self.network, width) for width in train.ema_snapshot_widths}
        self.ema: PowerEMA | DecayEMA
        if train.ema_decay is not None:
            self.ema = DecayEMA(self.network, train.ema_decay)
        elif train.ema_relative_width in self.tracked:
            self.ema = self.tracked[train.ema_relative_width]
        else:
            self.ema = PowerEMA(self.network, train.ema_relative_width)
        self.averages = list({id(a): a for a in (self.ema, *self.tracked.values())}.values())
        self.losses = LossByNoise(self.diffusion.resolutions, self.device)
        self._restore()
        self.log = MetricsLog(self.layout, self.num_images) if self.rank == 0 else None

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
            self._train(reader)
        if self.rank == 0:
            self._export()

    def _train(self, reader: Iterator[Batch]) -> None:
        train = self.config.train
        stopwatch, logged, began = Stopwatch(), self.num_images, time.perf_counter()
        norm = torch.zeros(())
        while self.num_images < train.num_images:
            with stopwatch.time("data"):
                batch = next(reader)
            with stopwatch.time("model"):
                self._backward(batch)
            with stopwatch.time("optimizer"):
                norm = self._step()
            before, self.num_images = self.num_images, self.num_images + train.batch_size
            done = self.num_images >= train.num_images
            if done or _crossed(train.log_every_images, before, self.num_images):
                speed = (self.num_images - logged) / (time.perf_counter() - began)
                self._log(norm, speed, stopwatch.take())
                logged, began = self.num_images, time.perf_counter()
            with stopwatch.time("other"):
                if _crossed(train.grid_every_images, before, self.num_images) and not done:
                    self._draw_grid()
                if done or _crossed(train.checkpoint_every_images, before, self.num_images):
                    self._save()

    def _backward(self, batch: Batch) -> None:
        """Gradients of one batch."""
        train, local = self.config.train, len(batch.pictures)
        shared = torch.Generator().manual_seed(_seed(self.config.seed, self.num_images))
        own = torch.Generator().manual_seed(_seed(self.config.seed, self.num_images, self.rank + 1))
        t = stratified_times(self.rank * local, local, train.batch_size, shared).to(self.device)
        channels = self.config.model.picture_channels
        eps = self.diffusion.noise(
            lambda r: torch.randn(local, channels, r, r, generator=own).to(self.device)
        )
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=train.precision == "bfloat16"
        ):
            loss = self.diffusion.loss(
                self.model,
                to_float(batch.pictures.to(self.device)),
                eps,
                t,
                batch.text.to(self.device, torch.float32),
                batch.text_mask.to(self.device),
                crop=random_crop(self.config, own),
            )
        torch.autograd.backward(loss.total)
        self.losses.add(self.diffusion.logsnr_ref(t), loss.per_picture)

    def _step(self) -> Tensor:
        """One optimizer step; returns the gradient's norm before clipping."""
        train = self.config.train
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), train.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, self.num_images)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.rank == 0:
            for average in self.averages:
                average.update(self.network)
        return norm

    def _log(self, norm: Tensor, images_per_second: float, seconds: dict[str, float]) -> None:
        """Checks that the loss is finite, on every rank, and adds one line to rank 0's log."""
        losses = self.losses.take()
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(
                f"the loss is {losses} after {self.num_images} pictures; training stops at the last "
                f"checkpoint in {self.layout.checkpoints}; a lower train.learning_rate may help"
            )
        if self.log is None:
            return
        total = sum(seconds.values())
        self.log.add(
            self.num_images,
            losses
            | {f"time/{name}": spent / total for name, spent in sorted(seconds.items())}
            | {
                "grad_norm": float(norm),
                "learning_rate": self.optimizers[0].param_groups[0]["lr"],
                "images_per_second": images_per_second,
            },
        )

    def _save(self) -> None:
        """Hands a checkpoint to Ray Train. All ranks call it: report is a barrier."""
        metrics: dict[str, Any] = {"num_images": self.num_images}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "config": to_yaml(self.config),
                "num_images": self.num_images,
                "network": self.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "averages": [average.state_dict() for average in self.averages],
            }
            torch.save(state, Path(folder, STATE_FILE))
            model = model_config(self.config, self.dataset, self.num_images)
            snapshots.save(self.layout, model, self.tracked.values())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _restore(self) -> None:
        """Goes on from Ray Train's latest checkpoint, if there is one."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return
        with latest.as_directory() as folder:
            state = torch.load(
                Path(folder, STATE_FILE), map_location=self.device, weights_only=True
            )
        self.num_images = state["num_images"]
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(**saved)
        if self.rank == 0:
            event(logger, "resumed", images=self.num_images, checkpoint=latest.path)

    def _export(self) -> None:
        config = model_config(self.config, self.dataset, self.num_images)
        for name, content in checkpoint.encode(config, self.ema.weights).items():
            storage.write_atomically(storage.join(self.layout.model, name), content)
        event(logger, "exported", model=self.layout.model)

    def _draw_grid(self) -> None:
        """Rank 0 draws fixed captions with fixed seeds from the averaged weights."""
        if self.rank != 0 or not self.dataset.num_images("val"):
            return
        rows = range(min(GRID_CAPTIONS, self.dataset.num_images("val")))
        table = self.dataset.read("val", [CAPTIONS, TEXT, TEXT_LENGTHS], rows)
        tokens = [torch.from_numpy(text_of(row, 0).astype(np.float32)) for row in text_rows(table)]
        averaged = make_network(self.config.model)
        averaged.load_state_dict(self.ema.weights)
        pipe = LayeredPipeline(
            model_config(self.config, self.dataset, self.num_images), averaged, device=self.device
        )
        pictures = pipe.sample(*pad(tokens, self.config.text.max_tokens), list(rows))
        sheet = contact_sheet(
            [captions[0] for captions in table.column(CAPTIONS).to_pylist()],
            {resolution: list(batch.numpy()) for resolution, batch in pictures.items()},
            title=f"after {self.num_images:,} pictures",
        )
        assert self.log is not None
        self.log.add_grid(self.num_images, sheet)


class MetricsLog:
    """``metrics.jsonl``, TensorBoard events and grids of a run, in rank 0.

    Lines of an interrupted run beyond the position it goes on from are dropped.
    """

    def __init__(self, layout: RunDir, num_images: int) -> None:
        self.layout = layout
        self.lines: list[str] = []
        if num_images and storage.exists(layout.metrics_log):
            lines = storage.read_bytes(layout.metrics_log).decode().splitlines()
            self.lines = [line for line in lines if json.loads(line)["images"] <= num_images]
        self._board: Any = None
        if not storage.is_remote(layout.path):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(layout.tensorboard, purge_step=num_images or None)

    def add(self, num_images: int, values: dict[str, float]) -> None:
        """One line, at a position."""
        record = {"images": num_images, **{name: float(f"{v:.6g}") for name, v in values.items()}}
        self.lines.append(json.dumps(record))
        storage.write_atomically(self.layout.metrics_log, ("\n".join(self.lines) + "\n").encode())
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, num_images)
            self._board.flush()

    def add_grid(self, num_images: int, sheet: Any) -> None:
        """One contact sheet, at a position."""
        path = storage.join(self.layout.samples, f"{num_images:09d}.png")
        storage.write_atomically(path, png_bytes(sheet))
        if self._board is not None:
            self._board.add_image("samples", np.asarray(sheet), num_images, dataformats="HWC")


def learning_rate(train: TrainConfig, num_images: int) -> float:
    """Linear warm-up, constant, linear cooldown; for the step that starts after so many pictures."""
    warm = (num_images + train.batch_size) / max(train.warmup_images, 1)
    cool = (train.num_images - num_images) / max(train.cooldown_images, 1)
    return train.learning_rate * max(0.0, min(1.0, warm, cool))


def _crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every


def _seed(*parts: int) -> int:
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
