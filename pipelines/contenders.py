"""What `bench` runs: a network with the work that surrounds it in training and in sampling.

Both sides do the same: noise the batch, predict v, mean squared error, AdamW; and DPM-Solver++(2M) under guidance, with two rows
a picture. Ours is trained by `LayeredDiffusion` and drawn by `sampler.sample`, so that its pyramids, its loss over all layers and
the fusing of its heads are in its times; the peer gets diffusers' own scheduler. On a GPU training keeps float32 weights under
autocast to bfloat16, and sampling has weights in bfloat16. Called by `bench`.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layered_model.denoiser import Denoiser, Guidance
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.rows import Prompt
from layered_model.sampler import Drawing, Plan, sample
from layered_model.unet import UNetConfig, make_network
from pipelines import peer

NUM_TOKENS = 64
"""Text tokens of a picture, all of them real."""
NUM_STEPS = 3
"""Sampling steps of one drawing."""
GUIDANCE = 4.0
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True, slots=True)
class Batch:
    """What every contender works on."""

    pictures: Tensor
    text: Tensor
    mask: Tensor

    @classmethod
    def make(cls, config: UNetConfig, size: int, device: torch.device) -> "Batch":
        """Random pictures at the top resolution with random text."""
        generator = torch.Generator().manual_seed(0)
        top = config.resolutions[-1]
        pictures = torch.rand(size, config.picture_channels, top, top, generator=generator) * 2 - 1
        text = torch.randn(size, NUM_TOKENS, config.text_width, generator=generator)
        mask = torch.ones(size, NUM_TOKENS, dtype=torch.bool)
        return cls(pictures.to(device), text.to(device), mask.to(device))


class Contender(ABC):
    """A network and its work on one batch."""

    def __init__(self, network: nn.Module, batch: Batch) -> None:
        self.batch, self.device = batch, batch.pictures.device
        self.network = network.to(self.device).train()
        half = self.device.type == "cuda"
        self.drawing = (
            copy.deepcopy(network).to(torch.bfloat16).requires_grad_(False) if half else network
        )
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that draw."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @abstractmethod
    def loss(self) -> Tensor:
        """Noising, one pass, loss."""

    @abstractmethod
    def forward(self) -> object:
        """One pass without gradients."""

    @abstractmethod
    def draw(self) -> object:
        """`NUM_STEPS` steps of the sampler."""

    def autocast(self) -> torch.autocast:
        """The precision of training."""
        device = self.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def training_step(self) -> None:
        """Noising, forward, loss, backward, optimizer."""
        with self.autocast():
            loss = self.loss()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def use(self, memory_format: str) -> None:
        """Lays weights out in one of `FORMATS`; features follow."""
        for network in (self.network, self.drawing):
            network.to(memory_format=FORMATS[memory_format])  # type: ignore[call-overload]
        self.optimizer.state.clear()  # it is laid out as the weights were

    def compile(self) -> None:
        """Compiles both networks when they next run."""
        for network in (self.network, self.drawing):
            network.compile()


class Ours(Contender):
    """A layered or a single-scale network under `LayeredDiffusion`."""

    def __init__(self, config: UNetConfig, batch: Batch) -> None:
        torch.manual_seed(0)
        super().__init__(make_network(config), batch)
        self.layers = config.layers
        process = DiffusionConfig(noise="sinc", reference_resolution=64, weighting="flat")
        self.diffusion = LayeredDiffusion(process, config.layers)

    def loss(self) -> Tensor:
        """See the base class."""
        batch = self.batch
        t = torch.rand(len(batch.pictures), device=self.device)
        eps = self.diffusion.noise(lambda r: torch.randn(self._shape(r), device=self.device))
        return self.diffusion.loss(
            self.network, batch.pictures, eps, t, batch.text, batch.mask
        ).total

    def inputs(self, resolution: int | None = None) -> tuple[Any, ...]:
        """What the drawing network reads, up to a resolution."""
        batch = self.batch
        layers = self.layers[: self.diffusion.layers_up_to(resolution)[-1] + 1]
        x = [torch.randn(self._shape(r), device=self.device, dtype=self.dtype) for r in layers]
        logsnr = torch.zeros(len(batch.pictures), device=self.device)
        return x, logsnr, batch.text.to(self.dtype), batch.mask

    def forward(self, resolution: int | None = None) -> object:
        """See the base class; a resolution below the top is an early exit."""
        with torch.inference_mode():
            return self.drawing(*self.inputs(resolution))

    def draw(self, resolution: int | None = None) -> object:
        """See the base class; a resolution below the top is an early exit."""
        batch = self.batch
        prompt = Prompt(batch.text, batch.mask)
        denoiser = Denoiser(
            network=self.drawing,  # type: ignore[arg-type]
            diffusion=self.diffusion,
            prompt=prompt,
            negative=Prompt(batch.text, torch.zeros_like(batch.mask)),
            guidance=Guidance(scale=GUIDANCE),
        )
        seeds = [torch.Generator().manual_seed(i) for i in range(len(batch.pictures))]
        plan = Plan(num_steps=NUM_STEPS, resolution=resolution)
        return sample(Drawing(denoiser, seeds, plan))

    def _shape(self, resolution: int) -> tuple[int, int, int, int]:
        b, c = self.batch.pictures.shape[:2]
        return b, c, resolution, resolution


class Theirs(Contender):
    """diffusers' `UNet2DConditionModel` with its scheduler."""

    def __init__(self, config: UNetConfig, widths: peer.Widths, batch: Batch) -> None:
        torch.manual_seed(0)
        super().__init__(peer.make(config, widths), batch)
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler
        self.scheduler = scheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )

    def loss(self) -> Tensor:
        """See the base class."""
        x0, eps = self.batch.pictures, torch.randn_like(self.batch.pictures)
        step = torch.randint(1000, (len(x0),), device=self.device)
        alpha, sigma = self._alpha_sigma(step)
        v_hat = peer.call(self.network, alpha * x0 + sigma * eps, step, self.batch.text)
        return (v_hat.float() - (alpha * eps - sigma * x0)).square().mean()

    def forward(self) -> object:
        """See the base class."""
        with torch.inference_mode():
            x = torch.randn_like(self.batch.pictures, dtype=self.dtype)
            step = torch.zeros(len(x), device=self.device)
            return peer.call(self.drawing, x, step, self.batch.text.to(self.dtype))

    @torch.inference_mode()
    def draw(self) -> object:
        """See the base class."""
        x = torch.randn_like(self.batch.pictures)
        text = self.batch.text.to(self.dtype)
        text = torch.cat([text, torch.zeros_like(text)])
        self.scheduler.set_timesteps(NUM_STEPS, device=self.device)
        for step in self.scheduler.timesteps:
            both = torch.cat([x, x]).to(self.dtype)
            output = peer.call(self.drawing, both, step, text).float()
            cond, uncond = output.chunk(2)
            guided = uncond + GUIDANCE * (cond - uncond)
            x = self.scheduler.step(guided, step, x, return_dict=False)[0]
        return x

    def _alpha_sigma(self, step: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.scheduler.alphas_cumprod.to(self.device)[step][:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()
