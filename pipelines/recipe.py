"""What training does, apart from doing it: the network it starts from, averages, learning rate, chance, a model's description.

Called by `trainer` and `bench_train`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.crop import Box
from layered_model.diffusion import LayeredDiffusion
from layered_model.ema import DecayEMA, PowerEMA
from layered_model.growth import grow
from layered_model.loss import stratified_times
from layered_model.text import EncoderInfo
from layered_model.unet import LayeredUNet, Network, make_network
from pipelines import costs, storage
from pipelines.config import Config
from pipelines.dataset import PreparedDataset
from pipelines.sections import SampleConfig, TrainConfig


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
        sampling=sampling_defaults(config.sample),
        num_images_trained=num_images,
    )


def sampling_defaults(sample: SampleConfig) -> SamplingDefaults:
    """What is drawn with where nothing else is asked for."""
    return SamplingDefaults(
        sampler=sample.sampler,
        num_steps=sample.num_steps,
        guidance=sample.guidance,
        fuse_weight=sample.fuse_weight,
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


class Chance(NamedTuple):
    """What is random in a worker's share of a step."""

    t: Tensor
    "Times [b]; even over the batch of all workers."
    eps: list[Tensor]
    "Noise of each layer [b, c, r, r]."
    crop: Box | None
    "Where the layers above the trunk are trained; None for everywhere."


def draw_chance(
    config: Config,
    diffusion: LayeredDiffusion,
    *,
    seen: int,
    rank: int,
    count: int,
    device: torch.device,
) -> Chance:
    """Draws what decides a step, and seeds the dropout; all of it is a function of seed, pictures seen and rank.

    Args:
        config: of the run.
        diffusion: of the configuration.
        seen: pictures before this step, by all workers.
        rank: of the worker.
        count: pictures of the worker's share, as many as of each other's.
        device: where to put it; it is drawn on the CPU.
    """
    shared = torch.Generator().manual_seed(_seed(config.seed, seen))
    own = torch.Generator().manual_seed(_seed(config.seed, seen, rank + 1))
    torch.manual_seed(_seed(config.seed, seen, rank + 1, 1))  # of dropout
    t = stratified_times(rank * count, count, config.train.batch_size, shared).to(device)
    channels = config.model.picture_channels
    eps = diffusion.noise(lambda r: torch.randn(count, channels, r, r, generator=own).to(device))
    return Chance(t, eps, random_crop(config, own))


def _seed(*parts: int) -> int:
    """One 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def random_crop(config: Config, generator: torch.Generator) -> Box | None:
    """Where this step trains the layers above the trunk; None for everywhere."""
    if config.train.crop_resolution is None:
        return None
    lowest, side = config.model.resolutions[0], _crop_side(config)
    top, left = torch.randint(lowest - side + 1, (2,), generator=generator).tolist()
    return Box(top, left, side, side)


def _crop_side(config: Config) -> int:
    """Of the square that is trained on, in pixels of the lowest resolution."""
    lowest, highest = config.model.resolutions[0], config.model.resolutions[-1]
    side = config.train.crop_resolution
    return lowest if side is None else side * lowest // highest


def step_macs(config: Config) -> int:
    """Multiply-adds of training on one picture: of a forward pass, and twice as many of a backward pass.

    What activation checkpointing computes again does not count, as in the model FLOPs utilization of Chowdhery et al. (2022,
    "PaLM", https://arxiv.org/abs/2204.02311, appendix B).
    """
    crop = None
    if config.train.crop_resolution is not None:
        side, lowest = _crop_side(config), config.model.resolutions[0]
        middle = (lowest - side) // 2
        crop = Box(middle, middle, side, side)
    return 3 * costs.network_macs(config.model, config.text.max_tokens, crop=crop)


def peak_images_per_second(config: Config, device: torch.device, num_workers: int) -> float:
    """Speed at which all workers would train if a step were one large matrix product, each as quick as on this device."""
    rate = costs.matmul_rate(device, getattr(torch, config.train.precision))
    return num_workers * rate / step_macs(config)


def make_averages(
    network: Network, train: TrainConfig
) -> tuple[PowerEMA | DecayEMA, list[PowerEMA]]:
    """The average that is exported, and those that are kept as snapshots, among which it may be."""
    tracked = {width: PowerEMA(network, width) for width in train.ema_snapshot_widths}
    if train.ema_decay is not None:
        return DecayEMA(network, train.ema_decay), list(tracked.values())
    width = train.ema_relative_width
    return tracked.get(width) or PowerEMA(network, width), list(tracked.values())


def learning_rate(train: TrainConfig, num_images: int) -> float:
    """Linear warm-up, constant, linear cooldown; for the step that starts after so many pictures."""
    warm = (num_images + train.batch_size) / max(train.warmup_images, 1)
    cool = (train.num_images - num_images) / max(train.cooldown_images, 1)
    return train.learning_rate * max(0.0, min(1.0, warm, cool))


def peak_learning_rate(train: TrainConfig) -> float:
    """The highest that `learning_rate` comes to: less than its setting where training is shorter than warm-up and cooldown."""
    if train.warmup_images + train.cooldown_images <= train.num_images:
        return train.learning_rate
    return max(learning_rate(train, seen) for seen in range(0, train.num_images, train.batch_size))
