"""What training does, apart from doing it: the network it starts from, averages, learning rate, crops, a model's description.

Called by `trainer` and `bench_train`.
"""

import torch

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig, SamplingDefaults
from layered_model.crop import Box
from layered_model.ema import DecayEMA, PowerEMA
from layered_model.growth import grow
from layered_model.text import EncoderInfo
from layered_model.unet import LayeredUNet, Network, make_network
from pipelines import costs, storage
from pipelines.config import Config
from pipelines.dataset import PreparedDataset
from pipelines.sections import TrainConfig


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
