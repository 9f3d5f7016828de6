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
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig
from layered_model.denoiser import Denoiser, Guidance
from layered_model.diffusion import LayeredDiffusion
from layered_model.images import Pictures, from_pillow, to_float, to_uint8
from layered_model.resample import downscale, upscale
from layered_model.rows import Prompt
from layered_model.sampler import Drawing, Plan, Step, sample
from layered_model.shape import UNetConfig
from layered_model.steppers import LayerPicture, Picture, SamplerKind
from layered_model.text import TextEncoder, pad
from layered_model.unet import Network, make_network

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm


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
        weights_sha256: Names the weights that were loaded; empty for a model that was not.
        device: Where to compute.
    """

    path: str | None = None
    "The model's directory, where the model came from one."

    def __init__(
        self,
        config: ModelConfig,
        network: Network,
        weights_sha256: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.network.requires_grad_(False)
        self.weights_sha256 = weights_sha256
        self.diffusion = LayeredDiffusion(config.diffusion, config.network.layers)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Loads a model's directory, local or remote. The text encoder is loaded when a prompt first needs it.

        Raises:
            FileNotFoundError: if the path is not a model's directory.
            ValueError: if its content is damaged or of another format.
        """
        config, weights, sha256 = checkpoint.load(str(path))
        network = _fresh(config.network, seed=0)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: its weights are not of the network that its {checkpoint.CONFIG_FILE} describes: {error}"
            ) from error
        pipeline = cls(config, network, sha256, device)
        pipeline.path = str(path)
        return pipeline

    def save_pretrained(self, path: str | Path, *, with_text_encoder: bool = False) -> None:
        """Writes the model's directory; each file appears whole, the configuration last.

        Args:
            path: Directory, made if it is not there.
            with_text_encoder: Puts the text encoder beside the network, so that the directory is all that drawing needs; else
                the encoder is named, and found where it was found in training.

        Raises:
            ValueError: if the path is an address: `layered export` writes to those.
        """
        if "://" in str(path):
            raise ValueError(f"path={str(path)!r} must be a directory of this machine")
        os.makedirs(path, exist_ok=True)
        bundled = Path(path, checkpoint.TEXT_ENCODER) if with_text_encoder else None
        if bundled:
            written = Path(path, f".{bundled.name}.tmp")
            self.text_encoder.save_pretrained(written)
            shutil.rmtree(bundled, ignore_errors=True)
            written.rename(bundled)
        files = checkpoint.encode(self.config, self.network.state_dict(), bundled)
        for name, content in files.items():
            temporary = Path(path, f".{name}.tmp")
            temporary.write_bytes(content)
            os.replace(temporary, Path(path, name))

    def untrained(self, seed: int = 0) -> Self:
        """The same model with fresh weights: what training starts from."""
        fresh = type(self)(self.config, _fresh(self.config.network, seed), device=self.device)
        fresh.path = self.path  # where the text encoder may be
        return fresh

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels of a side of each layer, low to high."""
        return self.config.network.layers

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
        return checkpoint.load_text_encoder(self.config.text, self.path, self.device)

    def encode(self, prompts: Sequence[str]) -> Prompt:
        """Token embeddings of prompts; an empty prompt has no tokens and is thus unconditional."""
        prompts = _texts("prompts", prompts)
        encoded = [
            tokens if prompt.strip() else tokens[:0]
            for prompt, tokens in zip(
                prompts, self.text_encoder.encode(prompts).tokens, strict=True
            )
        ]
        return Prompt(*pad(encoded, self.config.text.max_tokens))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Moves the network, and says in which precision it computes; states, noise and resampling stay float32.

        Raises:
            ValueError: if the dtype is not float32, bfloat16 or float16.
        """
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float16"
            )
        if device is not None:
            self.device = torch.device(device)
            self.network.to(self.device)
            self.__dict__.pop("text_encoder", None)
        if dtype is not None:
            for parameter in self.network.parameters():  # buffers keep their precision
                parameter.data = parameter.data.to(dtype)
        return self

    def compile(self, **options: Any) -> Self:
        """Compiles the network when it first runs, as ``torch.compile(fullgraph=True, ...)``; each shape once."""
        self.network.compile(fullgraph=True, **options)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str | Sequence[str] = "",
        layer_prompts: Mapping[int, str | Sequence[str]] | None = None,
        sampler: SamplerKind | None = None,
        eta: float | None = None,
        threshold: float | None = None,
        fuse_weight: float | None = None,
        resolution: int | None = None,
        hand_over: float | None = None,
        image: Pictures | None = None,
        finish: Pictures | None = None,
        strength: float = 0.8,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> LayeredOutput:
        """Draws one picture a prompt, at every resolution.

        Args:
            prompt: What to draw; several for several pictures.
            seed: Picture i is drawn from ``seed + i``, or from ``seed[i]``.
            num_steps: Steps from noise to picture; the model's default for None, as for guidance and sampler.
            guidance: How far to follow the prompt, for all layers or for each, low to high; 1 is the plain conditional model.
            guidance_interval: The reference's logsnr, from and to, between which guidance acts; always for None.
            negative_prompt: What to move away from under guidance; one for all, or one a prompt.
            layer_prompts: For some of the resolutions above the lowest, a prompt of their own; one for all, or one a prompt.
            sampler: See `layered_model.steppers`.
            eta: Fresh noise per step for 'ddim', from 0 to 1.
            threshold: Quantile of dynamic thresholding, e.g. 0.995, against the glare of strong guidance; None clamps.
            fuse_weight: 1 lets each layer decide its own band; 0 believes the top alone, as models without shared noise do. For
                None the model's default, and 1 where layers have guidance of their own, which acts on their bands.
            resolution: Stop at this resolution, and save the time of those above.
            hand_over: Logsnr of the reference below which the lowest layer runs alone, e.g. -4, which saves time.
            image: Where to start from, of a resolution of the model and at least as large as what is drawn; one, or one a prompt.
            finish: A picture of a lower resolution to finish: what is drawn is that picture when downscaled.
            strength: Share of the steps to take from `image` or `finish`: how much of an image may change, in (0, 1].
            on_step: Called after each evaluation of the network with the estimates so far.
            progress: Shows a bar.

        Raises:
            ValueError: if an argument is out of range or does not fit the others; names it.
        """
        from PIL import Image

        prompts = _texts("prompt", prompt)
        if not prompts:
            raise ValueError("prompt=[] must hold at least one prompt")
        seeds = (
            [int(seed) + i for i in range(len(prompts))]
            if isinstance(seed, int | Integral)
            else list(seed)
        )
        if len(seeds) != len(prompts):
            raise ValueError(
                f"seed={seeds} must be one number, or one for each of {len(prompts)} prompts"
            )
        negative = self._encode_for(prompts, "negative_prompt", negative_prompt)
        drawn = self.sample(
            *self.encode(prompts),
            seeds,
            num_steps=num_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            negative=negative if negative.mask.any() else None,
            layer_prompts={
                layer: self._encode_for(prompts, f"layer_prompts[{layer}]", text)
                for layer, text in (layer_prompts or {}).items()
            },
            sampler=sampler,
            eta=eta,
            threshold=threshold,
            fuse_weight=fuse_weight,
            resolution=resolution,
            hand_over=hand_over,
            image=from_pillow("image", image),
            finish=from_pillow("finish", finish),
            strength=strength,
            on_step=on_step,
            progress=progress,
        )
        images = {r: [Image.fromarray(p) for p in batch.numpy()] for r, batch in drawn.items()}
        return LayeredOutput(images=images, seeds=seeds)

    def sample(
        self,
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative: Prompt | None = None,
        layer_prompts: Mapping[int, Prompt] | None = None,
        sampler: SamplerKind | None = None,
        eta: float | None = None,
        threshold: float | None = None,
        fuse_weight: float | None = None,
        resolution: int | None = None,
        hand_over: float | None = None,
        image: Tensor | None = None,
        finish: Tensor | None = None,
        strength: float = 0.8,
        on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> dict[int, UInt8[Tensor, "b _h _w 3"]]:
        """Draws one picture a row of text, from embeddings; the rest is as in a call, but pictures are uint8 NHWC.

        Returns:
            uint8 NHWC on the CPU for each resolution, low to high.
        """
        drawing = self.begin(
            text,
            text_mask,
            seeds,
            num_steps=num_steps,
            guidance=guidance,
            guidance_interval=guidance_interval,
            negative=negative,
            layer_prompts=layer_prompts,
            sampler=sampler,
            eta=eta,
            threshold=threshold,
            fuse_weight=fuse_weight,
            resolution=resolution,
            hand_over=hand_over,
            image=image,
            finish=finish,
            strength=strength,
        )
        with _bar(len(drawing)) if progress else nullcontext() as bar:

            def report(step: Step) -> None:
                if bar is not None:
                    bar.update()
                if on_step is not None:
                    on_step(step)

            x0 = sample(drawing, report)
        return {layer.shape[-1]: to_uint8(layer).cpu() for layer in x0}

    def begin(
        self,
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative: Prompt | None = None,
        layer_prompts: Mapping[int, Prompt] | None = None,
        sampler: SamplerKind | None = None,
        eta: float | None = None,
        threshold: float | None = None,
        fuse_weight: float | None = None,
        resolution: int | None = None,
        hand_over: float | None = None,
        image: Tensor | None = None,
        finish: Tensor | None = None,
        strength: float = 0.8,
    ) -> Drawing:
        """What `sample` draws, before its first step; for who takes the steps himself."""
        if len(seeds) != len(text):
            raise ValueError(f"seeds={list(seeds)} must hold one for each of {len(text)} prompts")
        for number in seeds:
            if not -(2**63) <= number < 2**64:
                raise ValueError(f"seed={number} must have 64 bits")
        if text.shape[2] != self.config.network.text_width:
            raise ValueError(
                f"text has width {text.shape[2]}, but the model reads {self.config.network.text_width}"
            )
        defaults = self.config.sampling
        if guidance is None:
            guidance = defaults.guidance
        scale = float(guidance) if isinstance(guidance, float | Real) else tuple(guidance)
        if fuse_weight is None:
            fuse_weight = 1.0 if isinstance(scale, tuple) else defaults.fuse_weight
        plan = Plan(
            num_steps=defaults.num_steps if num_steps is None else num_steps,
            sampler=sampler or defaults.sampler,
            eta=eta,
            resolution=resolution,
            strength=strength,
            hand_over=hand_over,
        )
        start, low = self._start(len(seeds), resolution, image, finish)
        prompt = self._place(Prompt(text, text_mask))
        if negative is not None and negative.text.shape != text.shape:
            raise ValueError(
                f"negative has shape {tuple(negative.text.shape)}; it must be that of the text, {tuple(text.shape)}"
            )
        if negative is None:
            negative = Prompt(torch.zeros_like(prompt.text), torch.zeros_like(prompt.mask))
        denoiser = Denoiser(
            network=self.network,
            diffusion=self.diffusion,
            prompt=prompt,
            negative=self._place(negative),
            guidance=Guidance(
                scale=scale,
                **({"logsnr_interval": guidance_interval} if guidance_interval else {}),
            ),
            layer_prompts=self._by_layer(layer_prompts),
            threshold=threshold,
            fuse_weight=fuse_weight,
            low=low,
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return Drawing(denoiser, generators, plan, start)

    def _place(self, prompt: Prompt) -> Prompt:
        return Prompt(prompt.text.to(self.device), prompt.mask.to(self.device))

    def _encode_for(self, prompts: list[str], name: str, value: str | Sequence[str]) -> Prompt:
        """Further texts for the same prompts: one for all of them, or one each."""
        texts = _texts(name, value)
        if isinstance(value, str):
            texts *= len(prompts)
        if len(texts) != len(prompts):
            raise ValueError(
                f"{name} holds {len(texts)} texts; it must be one, or one for each of {len(prompts)} prompts"
            )
        return self.encode(texts)

    def _by_layer(self, prompts: Mapping[int, Prompt] | None) -> tuple[Prompt | None, ...] | None:
        """A prompt or None for each layer; None if no layer has its own."""
        for resolution in prompts or ():
            if resolution not in self.resolutions[1:]:
                raise ValueError(
                    f"layer_prompts[{resolution}] must be for one of {self.resolutions[1:]}; "
                    "the lowest layer's is the prompt itself"
                )
        if not prompts:
            return None
        return tuple(self._place(prompts[r]) if r in prompts else None for r in self.resolutions)

    def _start(
        self, count: int, resolution: int | None, image: Tensor | None, finish: Tensor | None
    ) -> tuple[Picture | None, LayerPicture | None]:
        """The clean pictures to start from, and the low ones to impose."""
        if image is not None and finish is not None:
            raise ValueError("image and finish cannot both be given: each says where to start")
        top = self.diffusion.layers_up_to(resolution)[-1]
        side, kernel = self.resolutions[top], self.diffusion.kernel
        if image is not None:
            x0 = self._picture("image", image, count, self.resolutions[top:])
            return downscale(x0, side, kernel), None
        if finish is not None:
            low = self._picture("finish", finish, count, self.resolutions[:top])
            return upscale(low, side, kernel), low
        return None, None

    def _picture(self, name: str, value: Tensor, count: int, sides: tuple[int, ...]) -> Picture:
        if value.dtype != torch.uint8 or value.ndim != 4 or value.shape[3] != 3:
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}; a tensor must be uint8 of [n, h, w, 3]"
            )
        num, height, width, _ = value.shape
        if height != width or height not in sides:
            raise ValueError(
                f"{name} is {width} x {height} pixels; it must be square, with a side of one of {sides}"
            )
        if num not in (1, count):
            raise ValueError(f"{name} holds {num} pictures; it must hold one, or {count}")
        return to_float(value.to(self.device)).expand(count, -1, -1, -1)


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} holds {text!r}, which is not a text")
    return texts


def _bar(num_steps: int) -> "tqdm[None]":
    from tqdm import tqdm

    return tqdm(desc="draw", unit="step", total=num_steps)


def _fresh(config: UNetConfig, seed: int) -> Network:
    """A network as training starts from it, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_network(config)
