"""From a prompt to pictures: network, diffusion and text encoder together.

    pipe = LayeredPipeline.from_pretrained("runs/demo/model")
    out = pipe("a red apple on a white background", seed=7)
    out.images[64][0].save("apple.png")      # the same picture as out.images[32][0] and out.images[16][0], larger

Picture i of a call is drawn from seed + i alone: the same seed gives the same picture, whatever else is in the batch. Called by
users, and by the evaluation and sampling stages.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig
from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_uint8
from layered_model.sampler import Denoiser, Guidance, Prompt, SamplerKind, sample
from layered_model.text import TextEncoder, pad
from layered_model.unet import LayeredUNet, UNetConfig

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class LayeredOutput:
    """Pictures of one call."""

    images: dict[int, list["Image"]]
    "For each resolution, low to high, one picture a prompt."
    seeds: list[int]
    "What each picture was drawn from."


class LayeredPipeline:
    """A trained model, ready to draw.

    Args:
        config: Everything about the model but its weights.
        network: The network; put in evaluation mode.
        weights_sha256: Names the weights; empty for a model that was never saved.
        device: Where to compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        network: LayeredUNet,
        weights_sha256: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.network.requires_grad_(False)
        self.weights_sha256 = weights_sha256
        self.diffusion = LayeredDiffusion(config.diffusion, config.network.resolutions)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Loads a model's directory, local or remote. The text encoder is loaded when a prompt first needs it.

        Raises:
            FileNotFoundError: if the path is not a model's directory.
            ValueError: if its content is damaged or of another format.
        """
        config, weights, sha256 = checkpoint.load(str(path))
        network = _fresh(config.network, seed=0)
        network.load_state_dict(weights)
        return cls(config, network, sha256, device)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the model's directory; each file appears whole, the configuration last."""
        os.makedirs(path, exist_ok=True)
        for name, content in checkpoint.encode(self.config, self.network.state_dict()).items():
            temporary = Path(path, f".{name}.tmp")
            temporary.write_bytes(content)
            os.replace(temporary, Path(path, name))

    def untrained(self, seed: int = 0) -> Self:
        """The same model with fresh weights: what training starts from."""
        return type(self)(self.config, _fresh(self.config.network, seed), device=self.device)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels of a side of each layer, low to high."""
        return self.config.network.resolutions

    @property
    def config_hash(self) -> str:
        """16 hex digits of the configuration."""
        content = json.dumps(asdict(self.config), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder that the model was trained with.

        Raises:
            ValueError: if it cannot be loaded, or its weights are not those of training.
        """
        trained_with = self.config.text
        encoder = TextEncoder.from_pretrained(
            trained_with.name, max_tokens=trained_with.max_tokens, device=self.device
        )
        if encoder.info.weights != trained_with.weights:
            raise ValueError(
                f"text encoder {trained_with.name} has weights {encoder.info.weights}, "
                f"but the model was trained with {trained_with.weights}"
            )
        return encoder

    def encode(self, prompts: Sequence[str]) -> Prompt:
        """Token embeddings of prompts; an empty prompt has no tokens and is thus unconditional."""
        encoded = [
            tokens if prompt.strip() else tokens[:0]
            for prompt, tokens in zip(
                prompts, self.text_encoder.encode(prompts).tokens, strict=True
            )
        ]
        return Prompt(*pad(encoded, self.config.text.max_tokens))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        num_steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        sampler: SamplerKind | None = None,
        resolution: int | None = None,
    ) -> LayeredOutput:
        """Draws one picture a prompt, at every resolution.

        Args:
            prompt: What to draw; several for several pictures.
            seed: Picture i is drawn from ``seed + i``.
            num_steps: Network evaluations; the model's default for None.
            guidance: How far to follow the prompt; 1 is the plain conditional model.
            negative_prompt: What to move away from under guidance.
            sampler: 'dpmpp_2m' or 'ddim'.
            resolution: Stop at this resolution, and save the time of those above.
        """
        from PIL import Image

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        text = self.encode(prompts)
        seeds = [seed + i for i in range(len(prompts))]
        negative = self.encode([negative_prompt] * len(prompts)) if negative_prompt else None
        pictures = self.sample(
            *text,
            seeds,
            num_steps=num_steps,
            guidance=guidance,
            sampler=sampler,
            resolution=resolution,
            negative=negative,
        )
        images = {r: [Image.fromarray(p) for p in batch.numpy()] for r, batch in pictures.items()}
        return LayeredOutput(images=images, seeds=seeds)

    def sample(
        self,
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        sampler: SamplerKind | None = None,
        resolution: int | None = None,
        negative: Prompt | None = None,
        on_step: Callable[[int, list[Tensor]], None] | None = None,
    ) -> dict[int, UInt8[Tensor, "b _h _w 3"]]:
        """Draws one picture a row of text, from embeddings.

        Returns:
            uint8 NHWC on the CPU for each resolution, low to high.
        """
        defaults = self.config.sampling
        prompt = Prompt(text.to(self.device), text_mask.to(self.device))
        if negative is None:
            negative = Prompt(torch.zeros_like(prompt.text), torch.zeros_like(prompt.mask))
        denoiser = Denoiser(
            network=self.network,
            diffusion=self.diffusion,
            prompt=prompt,
            negative=Prompt(negative.text.to(self.device), negative.mask.to(self.device)),
            guidance=Guidance(scale=defaults.guidance if guidance is None else guidance),
        )
        x0 = sample(
            denoiser,
            [torch.Generator().manual_seed(seed) for seed in seeds],
            num_steps=defaults.num_steps if num_steps is None else num_steps,
            sampler=sampler or defaults.sampler,
            resolution=resolution,
            on_step=on_step,
        )
        return {layer.shape[-1]: to_uint8(layer).cpu() for layer in x0}


def _fresh(config: UNetConfig, seed: int) -> LayeredUNet:
    """A network as training starts from it, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LayeredUNet(config)
