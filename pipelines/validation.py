"""How good a network under training is, on what it is not trained on: a loss that can be compared over time, and pictures.

The loss is that of training, on fixed pictures of the validation split with fixed captions, times and noise, so that its changes
are the network's alone. Called by `trainer`, on rank 0.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from layered_model.checkpoint import ModelConfig
from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_float
from layered_model.loss import stratified_times
from layered_model.pipeline import LayeredPipeline
from layered_model.text import pad
from layered_model.unet import Network
from pipelines.config import Config
from pipelines.dataset import PreparedDataset, decode_rows, text_of, text_rows
from pipelines.grid import contact_sheet
from pipelines.schema import CAPTIONS, IMAGE, TEXT, TEXT_LENGTHS

GRID_CAPTIONS = 8
SPLIT = "val"


def num_rows(config: Config, dataset: PreparedDataset) -> int:
    """Pictures that the loss is taken over; 0 where there are none."""
    return min(config.train.num_validation_images, dataset.num_images(SPLIT))


@torch.no_grad()
def validation_loss(
    config: Config, dataset: PreparedDataset, network: nn.Module, device: torch.device
) -> dict[str, float]:
    """Mean loss of a network over fixed pictures.

    Returns:
        ``val/loss``, weighted as in training and over all layers, and ``val/loss/32``, unweighted, for each layer.
    """
    diffusion = LayeredDiffusion(config.diffusion, config.model.layers)
    total, count = 0.0, num_rows(config, dataset)
    per_layer = torch.zeros(len(diffusion.resolutions))
    t = stratified_times(0, count, count, torch.Generator().manual_seed(config.seed))
    network.eval()

    def draw(resolution: int) -> Tensor:
        # A generator for each picture, so that they may be taken in parts of any size.
        shape = (config.model.picture_channels, resolution, resolution)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    for rows in _parts(count, max(1, config.train.batch_size // config.train.accumulation_steps)):
        table = dataset.read(SPLIT, [IMAGE, TEXT, TEXT_LENGTHS], rows)
        tokens = [torch.from_numpy(text_of(row, 0).astype(np.float32)) for row in text_rows(table)]
        text, mask = pad(tokens, config.text.max_tokens)
        generators = [torch.Generator().manual_seed(config.seed + 1 + row) for row in rows]
        eps = diffusion.noise(draw)
        pictures = to_float(torch.from_numpy(decode_rows(table)).to(device))
        bfloat16 = config.train.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            terms = diffusion.loss(
                network, pictures, eps, t[list(rows)].to(device), text.to(device), mask.to(device)
            )
        total += float(terms.total) * len(rows)
        per_layer += terms.per_picture.sum(1).cpu()
    means = (per_layer / count).tolist()
    return {"val/loss": total / count} | {
        f"val/loss/{resolution}": mean
        for resolution, mean in zip(diffusion.resolutions, means, strict=True)
    }


def draw_grid(
    config: ModelConfig, dataset: PreparedDataset, network: Network, device: torch.device
) -> Image.Image:
    """Fixed captions drawn with fixed seeds."""
    rows = range(min(GRID_CAPTIONS, dataset.num_images(SPLIT)))
    table = dataset.read(SPLIT, [CAPTIONS, TEXT, TEXT_LENGTHS], rows)
    tokens = [torch.from_numpy(text_of(row, 0).astype(np.float32)) for row in text_rows(table)]
    pipe = LayeredPipeline(config, network, device=device)
    pictures = pipe.sample(*pad(tokens, config.text.max_tokens), list(rows))
    return contact_sheet(
        [captions[0] for captions in table.column(CAPTIONS).to_pylist()],
        {resolution: list(batch.numpy()) for resolution, batch in pictures.items()},
        title=f"after {config.num_images_trained:,} pictures",
    )


def _parts(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))
