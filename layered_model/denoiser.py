"""The network as a sampler sees it: noisy states in, clean estimates out, with guidance and the one picture of all heads.

    guidance       x^_l = uncond_l + w_l (cond_l - uncond_l)        for each layer l, inside an interval of logsnr
    fused heads    x^   = x^_l + w U(x^_l-1 - D x^_l)               from the bottom up, see `LayeredDiffusion.fuse`
    thresholding   x^   = clip(x^, -q, q) / q, q >= 1               on the top alone, fused if it can be
    finishing      x^   = x^ + U(x0_low - D x^)                     the low band of a picture that is given

Guidance is linear and commutes with D; clipping is not and does not, so that it acts on the fused top, and lower pictures are
derived from what it leaves. Where every layer has a state of its own, nothing is fused, and each is clipped at its bound.
Called by `sampler` and `pipeline`.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layered_model.diffusion import LayeredDiffusion, Levels
from layered_model.parametrization import to_x0
from layered_model.resample import downscale
from layered_model.rows import LayerRows, Prompt, Rows, join_prompts, predict
from layered_model.steppers import LayerPicture, Picture
from layered_model.unet import Network

LOW_BOUND = 1.5
"""Where a state below the model's top is clamped: a sinc-downscaled photograph overshoots 1 by up to about half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).

    ``uncond + scale (cond - uncond)``, only while the reference's logsnr lies in the interval (Kynkaanniemi et al. 2024,
    https://arxiv.org/abs/2404.07724); outside it, and for scale 1, the network runs once instead of twice.
    """

    scale: float | tuple[float, ...] = 1.0
    "For all layers, or for each, low to high."
    logsnr_interval: tuple[float, float] = (-float("inf"), float("inf"))

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self._scales)):
            raise ValueError(
                f"guidance={self.scale} must be a finite number, or one for each layer"
            )
        low, high = self.logsnr_interval
        if not low <= high:
            raise ValueError(f"guidance interval {self.logsnr_interval} must go from low to high")

    @property
    def _scales(self) -> tuple[float, ...]:
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    def for_layers(self, num_layers: int) -> tuple[float, ...]:
        """The scale of each of a model's layers.

        Raises:
            ValueError: if there are scales for another number of layers.
        """
        scales = self._scales * (1 if isinstance(self.scale, tuple) else num_layers)
        if len(scales) != num_layers:
            raise ValueError(
                f"guidance={self.scale} must hold one scale for each of {num_layers} layers"
            )
        return scales

    @property
    def acts(self) -> bool:
        """Whether the network ever runs twice."""
        return any(scale != 1 for scale in self._scales)

    def active(self, logsnr: Float[Tensor, " b"]) -> slice | Int[Tensor, " guided"]:
        """The pictures that need the unconditional pass: all, none, or some; only the last has an accelerator's values read."""
        low, high = self.logsnr_interval
        if not self.acts:
            return slice(0)
        if math.isinf(low) and math.isinf(high):
            return slice(None)
        return ((logsnr >= low) & (logsnr <= high)).nonzero().flatten()


def dynamic_threshold(x0: Picture, share: float) -> Picture:
    """Scales a picture into [-1, 1] by the share-quantile of its magnitudes, where that is above 1, and clamps the rest.

    Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3: guidance then saturates fewer pixels.
    """
    bound = torch.quantile(x0.abs().flatten(1), share, dim=1).clamp(min=1)[:, None, None, None]
    return x0.clamp(-bound, bound) / bound


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The network with its prompt and guidance: noisy states in, clean estimates of the same layers out."""

    network: Network
    diffusion: LayeredDiffusion
    prompt: Prompt
    negative: Prompt
    guidance: Guidance
    layer_prompts: tuple[Prompt | None, ...] | None = None
    "For each layer, low to high, a prompt of its own, or None for the trunk's; the lowest takes none."
    threshold: float | None = None
    "Quantile of dynamic thresholding of the model's top, in (0, 1]; None clamps it to [-1, 1]."
    fuse_weight: float = 1.0
    "How far lower layers decide their band of the picture, in [0, 1]; 0 is the top layer alone, as it always is where each "
    "layer has a state of its own."
    low: Picture | None = None
    "A clean picture of a lower resolution, whose band every estimate takes over."

    def __post_init__(self) -> None:
        self.guidance.for_layers(len(self.diffusion.resolutions))
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0, up to 1")
        if not 0 <= self.fuse_weight <= 1:
            raise ValueError(f"fuse_weight={self.fuse_weight} must be from 0 to 1")
        if self.low is not None and not self.diffusion.one_state:
            raise ValueError("a low picture can be finished only by a model with shared noise")

    def ask(self, states: list[LayerPicture], levels: Levels) -> Rows:
        """What the network must answer: a row a picture, then one for each that is guided now, without its prompt."""
        diffusion, own = self.diffusion, self.layer_prompts
        inputs = diffusion.inputs_from_top(states[0], levels) if diffusion.one_state else states
        guided = self.guidance.active(levels.logsnr)
        return Rows(
            [torch.cat([x, x[guided]]) for x in inputs],
            torch.cat([levels.logsnr, levels.logsnr[guided]]),
            self._beside_negative(self.prompt, guided),
            own and tuple(p and self._beside_negative(p, guided) for p in own[: len(inputs)]),
        )

    def answer(self, outputs: LayerRows, asked: Rows, levels: Levels) -> list[LayerPicture]:
        """Estimates of the clean picture, one per state, from the network's outputs for what it was asked.

        A single state is the top's of the layers that run; its estimate is fused from all of them. The model's top is clamped to
        [-1, 1], a state below it to `LOW_BOUND`: a sinc-downscaled picture overshoots.
        """
        diffusion, count = self.diffusion, len(levels.logsnr)
        kind = diffusion.config.prediction
        guided = self.guidance.active(levels.logsnr)
        scales = self.guidance.for_layers(len(diffusion.resolutions))
        x0 = []
        for layer, (output, x_t) in enumerate(zip(outputs, asked.x, strict=True)):
            cond, uncond = output[:count], output[count:]
            mixed = uncond + scales[layer] * (cond[guided] - uncond)
            if len(mixed) < count:
                some, mixed = mixed, cond.clone()
                mixed[guided] = some
            x0.append(to_x0(kind, mixed, x_t[:count], *levels.layers[layer]))
        if diffusion.one_state:
            x0 = [self._imposed(diffusion.fuse(x0, self.fuse_weight))]
        return [self._imposed(self._bounded(estimate)) for estimate in x0]

    def __call__(self, states: list[LayerPicture], t: Float[Tensor, " b"]) -> list[LayerPicture]:
        """`ask`, the network, and `answer`, at each state's own time."""
        levels = self.diffusion.levels(t)
        asked = self.ask(states, levels)
        return self.answer(predict(self.network, asked), asked, levels)

    def _beside_negative(self, prompt: Prompt, rows: slice | Tensor) -> Prompt:
        return join_prompts([prompt, self.negative.take(rows)])

    def _bounded(self, x0: LayerPicture) -> LayerPicture:
        if x0.shape[-1] < self.diffusion.resolutions[-1]:
            return x0.clamp(-LOW_BOUND, LOW_BOUND)
        return x0.clamp(-1, 1) if self.threshold is None else dynamic_threshold(x0, self.threshold)

    def _imposed(self, top: LayerPicture) -> LayerPicture:
        """The estimate with the low picture in place of its own low band."""
        if self.low is None:
            return top
        if self.low.shape[-1] >= top.shape[-1]:
            return downscale(self.low, top.shape[-1], self.diffusion.kernel)
        return self.diffusion.fuse([self.low, top])
