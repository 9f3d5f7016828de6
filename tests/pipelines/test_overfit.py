"""A small model learns eight photographs by heart: each caption returns its own picture, at every resolution.

The whole chain is in it, from real text embeddings over noise, loss, optimizers and averaging to guidance-free sampling; what
draws a wrong picture, or a blurred one, cannot pass. It takes three minutes of one core.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from layered_model import LayeredPipeline, LayeredUNet, ModelConfig, SamplingDefaults
from layered_model.diffusion import LayeredDiffusion
from layered_model.ema import PowerEMA
from layered_model.images import to_float, to_uint8
from layered_model.loss import stratified_times
from layered_model.resample import downscale
from layered_model.text import TextEncoder, pad
from pipelines.config import load_config
from pipelines.optimizers import make_optimizers
from pipelines.pictures import crop_square, decode
from pipelines.recipe import learning_rate

NUM_PICTURES = 8
RESOLUTIONS = (16, 32, 64)
OVERRIDES = (
    f"model.resolutions={list(RESOLUTIONS)}",
    "model.channels=[16,32,64,96,96]",
    "model.blocks=[1,1,1,1,1]",
    "model.attention=[0,1,1]",
    "diffusion.reference_resolution=5",
    "diffusion.prediction=v",
    "diffusion.weighting=flat",
    "diffusion.layer_weights=[0.5,1,2]",
    "text.max_tokens=24",
    "train.batch_size=8",
    "train.num_images=4000",
    "train.warmup_images=160",
    "train.cooldown_images=2200",
    "train.learning_rate=7.0e-3",
)
"""Of the demo's configuration. The level of 4 x 4 pixels tells every place from every other, which a picture learnt by heart
needs; a noisy schedule with flat weights on v, because only where there is nothing but noise the caption must say it all."""


def photographs(coco_mini: Path) -> tuple[torch.Tensor, list[str]]:
    """The first photographs, in [-1, 1], and a caption of each."""
    index = json.loads((coco_mini / "annotations/captions_train2017.json").read_text())
    captions = {row["image_id"]: row["caption"].strip() for row in index["annotations"]}
    pictures, texts = [], []
    for row in index["images"][:NUM_PICTURES]:
        content = (coco_mini / "train2017" / row["file_name"]).read_bytes()
        pictures.append(np.asarray(crop_square(decode(content), RESOLUTIONS[-1])))
        texts.append(captions[row["id"]])
    return to_float(torch.from_numpy(np.stack(pictures))), texts


def train(config, pictures, text, mask) -> LayeredUNet:
    """The training loop without Ray; returns the averaged network."""
    torch.manual_seed(0)
    network = LayeredUNet(config.model).to(memory_format=torch.channels_last)
    diffusion = LayeredDiffusion(config.diffusion, RESOLUTIONS)
    optimizers = make_optimizers(network, config.train)
    ema = PowerEMA(network, config.train.ema_relative_width)
    generator = torch.Generator().manual_seed(0)
    batch = config.train.batch_size
    for seen in range(0, config.train.num_images, batch):
        rows = torch.randperm(NUM_PICTURES, generator=generator)[:batch]
        t = stratified_times(0, batch, batch, generator)
        eps = diffusion.noise(lambda r: torch.randn(batch, 3, r, r, generator=generator))
        loss = diffusion.loss(network, pictures[rows], eps, t, text[rows], mask[rows])
        torch.autograd.backward(loss.total)
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.train, seen)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(network)
    network.load_state_dict(ema.weights)
    return network


def psnr(drawn: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair of pictures, in dB."""
    error = (drawn.double() - real.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error)


@pytest.mark.soak
def test_each_caption_returns_its_photograph(coco_mini, unchecked) -> None:
    config = load_config("demo", OVERRIDES)
    pictures, captions = photographs(coco_mini)
    encoder = TextEncoder.from_pretrained(config.text.encoder, max_tokens=config.text.max_tokens)
    text, mask = pad(encoder.encode(captions).tokens, config.text.max_tokens)
    network = train(config, pictures, text, mask)
    model = ModelConfig(
        network=config.model,
        diffusion=config.diffusion,
        text=encoder.info,
        sampling=SamplingDefaults(sampler="dpmpp_2m", num_steps=20, guidance=1.0),
    )
    drawn = LayeredPipeline(model, network).sample(text, mask, list(range(NUM_PICTURES)))
    for resolution in RESOLUTIONS:
        real = to_uint8(downscale(pictures, resolution))
        own = psnr(drawn[resolution], real)
        assert own.min() > 20, (resolution, own)
        others = torch.stack(
            [psnr(drawn[resolution], real.roll(k, 0)) for k in range(1, NUM_PICTURES)]
        )
        assert (own > others.amax(dim=0)).all(), resolution
