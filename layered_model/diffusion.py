"""The layered diffusion: pictures, noise and schedules of every layer together, and the training loss.

    x_t,l = alpha_l(t) D_l x0 + sigma_l(t) eps_l

Pictures and noise go through the same operator (see `resample`): with any other pairing (``picture_kernel``) the difference of
two inputs holds the clean picture without noise. With shared noise and ``extra = 0``, ``x_t`` of a low layer is ``c_t D x_t,top``
exactly with ``c_t = alpha_l / alpha_top``; with shared noise and unequal ``extra`` two layers' inputs determine the clean low
picture, which is refused unless ``allow_leak``. Called by the training stage, `sampler` and `pipeline`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layered_model import parametrization
from layered_model.crop import Box, cut_layers
from layered_model.loss import Weighting, output_weight
from layered_model.noise import NoiseKind, kernel_of, noise_pyramid
from layered_model.parametrization import Prediction
from layered_model.resample import Kernel, downscale, upscale
from layered_model.schedules import (
    alpha_sigma,
    clipped_outside,
    cosine_logsnr,
    layer_shift,
    relative_slope,
    time_of,
)

LEAST_LOGSNR = -30.0
"""Of the plain cosine, which reaches it at t = 1 - 2e-7."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The process that a model is trained for; stored in its checkpoint."""

    noise: NoiseKind
    "How the layers' noise is related: one field downscaled by 'sinc', 'periodic' or 'box', or 'independent'."
    reference_resolution: int
    "Resolution whose schedule is the plain cosine; larger layers are noisier at equal t, lower ones less noisy."
    detail_resolution: int | None = None
    "Resolution whose shift the schedule comes to at t = 0, at least the reference's; null for the plain cosine throughout."
    extra_logsnr: tuple[float, ...] = ()
    "Extra shift of each layer's logsnr, low to high; empty for none."
    picture_kernel: Kernel | None = None
    "How pictures are downscaled: 'sinc', 'periodic' or 'box'; null for as the noise, and sinc where the noise has none."
    allow_leak: bool = False
    """Permits, under shared noise, unequal extra shifts or pictures that are downscaled otherwise than the noise, which let the
    network read the clean low picture off its inputs."""
    logsnr_min: float = -15.0
    "Where the reference's logsnr is clipped below."
    logsnr_max: float = 15.0
    "Where the reference's logsnr is clipped above."
    prediction: Prediction = "v"
    "What the network outputs: 'v', 'x0' or 'eps'."
    weighting: Weighting = "sigmoid"
    "Weight over noise levels: 'flat', 'min_snr' or 'sigmoid'."
    layer_weights: tuple[float, ...] = ()
    "Weight of each layer's loss, low to high; empty for all 1."

    def __post_init__(self) -> None:
        if self.reference_resolution < 1:
            raise ValueError(f"reference_resolution={self.reference_resolution} must be positive")
        detail = self.detail_resolution
        if detail is not None and detail < self.reference_resolution:
            raise ValueError(
                f"detail_resolution={detail} must be at least reference_resolution="
                f"{self.reference_resolution}, or null for the plain cosine"
            )
        for name, kinds in (
            ("noise", NoiseKind),
            ("prediction", Prediction),
            ("weighting", Weighting),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of {', '.join(get_args(kinds))}"
                )
        for name in ("extra_logsnr", "layer_weights"):
            if not all(map(math.isfinite, getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} must hold finite numbers")
        if not -math.inf < self.logsnr_min < self.logsnr_max < math.inf:
            raise ValueError(
                f"logsnr_min={self.logsnr_min} must be below {self.logsnr_max}, both finite"
            )
        if self.logsnr_min - self.bend < LEAST_LOGSNR:
            raise ValueError(
                f"logsnr_min={self.logsnr_min} must be at least {LEAST_LOGSNR + self.bend:g}: below that float32 does not tell "
                "its times from 1"
            )
        if self.layer_weights and (min(self.layer_weights) < 0 or max(self.layer_weights) == 0):
            raise ValueError(f"layer_weights={self.layer_weights} must be >= 0 and not all 0")
        if self.noise != "independent" and len(set(self.extra_logsnr)) > 1 and not self.allow_leak:
            raise ValueError(
                f"extra_logsnr={self.extra_logsnr} must be equal for all layers with shared noise "
                f"(noise={self.noise}): otherwise the clean low picture is a linear combination of "
                "two inputs; set allow_leak=true to study that, or noise=independent"
            )
        if self.picture_kernel not in (None, *get_args(Kernel)):
            raise ValueError(
                f"picture_kernel={self.picture_kernel!r} must be one of {', '.join(get_args(Kernel))}, or null"
            )
        if not self.matched and not self.allow_leak:
            raise ValueError(
                f"picture_kernel={self.picture_kernel!r} must be that of the noise (noise={self.noise}), or null: "
                "otherwise the difference of two inputs holds the clean picture without noise; set allow_leak=true "
                "to study that, or noise=independent"
            )

    @property
    def bend(self) -> float:
        """How far the schedule is above the plain cosine at t = 0."""
        detail = self.detail_resolution or self.reference_resolution
        return layer_shift(self.reference_resolution, detail)

    @property
    def kernel(self) -> Kernel:
        """What pictures are downscaled with."""
        return self.picture_kernel or kernel_of(self.noise)

    @property
    def matched(self) -> bool:
        """Whether shared noise goes through the same operator as the pictures; also where no noise is shared."""
        return self.noise == "independent" or self.kernel == kernel_of(self.noise)


class Level(NamedTuple):
    """Signal and noise of a layer at the times of a batch."""

    alpha: Float[Tensor, "#b 1 1 1"]
    sigma: Float[Tensor, "#b 1 1 1"]


@dataclass(frozen=True, slots=True)
class Levels:
    """Of every layer at the times of a batch."""

    logsnr: Float[Tensor, " b"]
    "The reference's, which is what the network is told."
    layers: tuple[Level, ...]
    "Low to high."


class LossTerms(NamedTuple):
    """What one batch costs."""

    total: Float[Tensor, ""]
    "Weighted mean over pictures and layers; its gradient trains the network."
    per_layer: Float[Tensor, " layers"]
    "Unweighted mean squared error of each layer's output, detached."
    per_picture: Float[Tensor, "layers b"]
    "The same of each picture."


class LayeredDiffusion:
    """Schedules, pyramids and loss for a ladder of resolutions."""

    def __init__(self, config: DiffusionConfig, resolutions: Sequence[int]) -> None:
        for name in ("extra_logsnr", "layer_weights"):
            values = getattr(config, name)
            if values and len(values) != len(resolutions):
                raise ValueError(f"{name}={values} must hold one value for each of {resolutions}")
        self.config = config
        self.resolutions = tuple(resolutions)
        self.kernel = config.kernel
        self.bend = config.bend
        self.inside = clipped_outside(config.logsnr_min, config.logsnr_max, self.bend)
        self.shifts = tuple(
            layer_shift(resolution, config.reference_resolution) + extra
            for resolution, extra in zip(
                resolutions, config.extra_logsnr or [0.0] * len(resolutions), strict=True
            )
        )

    @property
    def one_state(self) -> bool:
        """Whether the pyramid is one diffusion: shared noise, matched pictures, the same extra shift for all layers."""
        config = self.config
        return (
            config.noise != "independent" and config.matched and len(set(config.extra_logsnr)) <= 1
        )

    def layers_up_to(self, resolution: int | None) -> tuple[int, ...]:
        """Indices of the layers up to a resolution, all for None.

        Raises:
            ValueError: if the model has no such resolution.
        """
        if resolution is not None and resolution not in self.resolutions:
            raise ValueError(f"resolution={resolution} must be one of {self.resolutions}")
        top = (
            len(self.resolutions) - 1 if resolution is None else self.resolutions.index(resolution)
        )
        return tuple(range(top + 1))

    def logsnr_ref(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The reference's logsnr, which is what the network is told."""
        return cosine_logsnr(t, self.config.logsnr_min, self.config.logsnr_max, self.bend)

    def time_of(self, logsnr: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """The time at which the reference has this logsnr; the inverse of `logsnr_ref` between the clips."""
        return time_of(logsnr, self.bend)

    def alpha_sigma(self, t: Float[Tensor, " b"], layer: int) -> Level:
        """A layer's alpha and sigma, ready to multiply pictures."""
        return self._level(self.logsnr_ref(t), layer)

    def levels(self, t: Float[Tensor, " b"]) -> Levels:
        """Everything that depends on the time alone."""
        logsnr = self.logsnr_ref(t)
        layers = range(len(self.resolutions))
        return Levels(logsnr, tuple(self._level(logsnr, layer) for layer in layers))

    def _level(self, logsnr: Float[Tensor, " b"], layer: int) -> Level:
        alpha, sigma = alpha_sigma(logsnr + self.shifts[layer])
        return Level(alpha[:, None, None, None], sigma[:, None, None, None])

    def pyramid(self, x0: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b c _h _w"]]:
        """The picture at every resolution up to its own, low to high; its own is one of the model's, or above all of them.

        Raises:
            ValueError: if it is neither.
        """
        side, top = x0.shape[-1], self.resolutions[-1]
        if side not in self.resolutions and side < top:
            raise ValueError(
                f"pictures of {side} pixels must have one of {self.resolutions}, or more"
            )
        return [downscale(x0, r, self.kernel) for r in self.resolutions if r <= side]

    def noise(
        self, draw: Callable[[int], Float[Tensor, "b c _h _w"]]
    ) -> list[Float[Tensor, "b c _h _w"]]:
        """Noise of every layer, low to high; `draw` returns fresh white noise of a resolution."""
        return noise_pyramid(draw, self.resolutions, self.config.noise)

    def inputs_from_top(
        self, x_t: Float[Tensor, "b c h w"], levels: Levels
    ) -> list[Float[Tensor, "b c _h _w"]]:
        """Every layer's noisy picture from the top's: ``c_t D x_t``. Shared noise without extra shifts only."""
        top = self.resolutions.index(x_t.shape[-1])
        alpha = [level.alpha for level in levels.layers]
        lower = [
            alpha[layer] / alpha[top] * downscale(x_t, resolution, self.kernel)
            for layer, resolution in enumerate(self.resolutions[:top])
        ]
        return [*lower, x_t]

    def fuse(
        self, x0: Sequence[Float[Tensor, "b c _h _w"]], weight: float = 1.0
    ) -> Float[Tensor, "b c h w"]:
        """One top picture from every layer's estimate: each layer has the last word on its own band.

        From the bottom up, ``x0 = x0_hi + w U(x0_lo - D x0_hi)``: with weight 1, low frequencies of the layer below and high ones
        of this layer; with weight 0, the top's estimate alone.
        """
        fused = x0[0]
        for x0_layer in x0[1:]:
            correction = fused - downscale(x0_layer, fused.shape[-1], self.kernel)
            fused = x0_layer + weight * upscale(correction, x0_layer.shape[-1], self.kernel)
        return fused

    def loss(
        self,
        network: nn.Module,
        x0: Float[Tensor, "b c h w"],
        eps: Sequence[Float[Tensor, "b c _h _w"]],
        t: Float[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
        crop: Box | None = None,
    ) -> LossTerms:
        """Weighted squared error of the network's output, averaged over pixels, pictures and layers.

        Args:
            network: A `layered_model.unet.LayeredUNet` or a wrapper with the same call.
            x0: Clean pictures at the top resolution, or at a higher one, which are downscaled.
            eps: Noise of every layer, see `noise`.
            t: Times, shared by all layers.
            text: Token embeddings.
            text_mask: Real tokens.
            crop: Part on which alone the layers above the lowest are computed and count, in pixels of the lowest.

        Raises:
            ValueError: if shapes, dtypes or values do not fit; values on an accelerator are not read.
        """
        self._check_batch(x0, eps, t, text, text_mask)
        kind = self.config.prediction
        inputs, targets = [], []
        for layer, (x0_layer, eps_layer) in enumerate(zip(self.pyramid(x0), eps, strict=True)):
            alpha, sigma = self.alpha_sigma(t, layer)
            inputs.append(alpha * x0_layer + sigma * eps_layer)
            targets.append(parametrization.target(kind, x0_layer, eps_layer, alpha, sigma))
        logsnr = self.logsnr_ref(t)
        if crop is None:
            outputs = network(inputs, logsnr, text, text_mask)
        else:
            outputs = network(inputs, logsnr, text, text_mask, crop=crop)
            targets = cut_layers(targets, crop)
        errors = torch.stack(
            [
                (output.float() - goal).square().mean(dim=(1, 2, 3))
                for output, goal in zip(outputs, targets, strict=True)
            ]
        )
        slope = relative_slope(t, self.inside, self.bend)
        weights = torch.stack(
            [
                output_weight(self.config.weighting, kind, logsnr + shift, slope, resolution)
                for shift, resolution in zip(self.shifts, self.resolutions, strict=True)
            ]
        )
        layer_weights = errors.new_tensor(self.config.layer_weights or [1.0] * len(errors))
        total = ((weights * errors).mean(dim=1) * layer_weights).sum() / layer_weights.sum()
        per_picture = errors.detach()
        return LossTerms(total=total, per_layer=per_picture.mean(dim=1), per_picture=per_picture)

    def _check_batch(
        self, x0: Tensor, eps: Sequence[Tensor], t: Tensor, text: Tensor, text_mask: Tensor
    ) -> None:
        """A batch whose parts fit together and the ladder."""
        top = self.resolutions[-1]
        if x0.ndim != 4 or x0.shape[-1] != x0.shape[-2] or x0.shape[-1] < top:
            raise ValueError(
                f"x0 has shape {tuple(x0.shape)}; it must be [b, c, {top}, {top}], the top resolution, or larger"
            )
        batch, channels = x0.shape[:2]
        expected = [(batch, channels, r, r) for r in self.resolutions]
        if [tuple(e.shape) for e in eps] != expected:
            raise ValueError(
                f"eps has shapes {[tuple(e.shape) for e in eps]}; they must be {expected}, see noise"
            )
        if t.shape != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be [{batch}], one per picture")
        if text.ndim != 3 or len(text) != batch:
            raise ValueError(f"text has shape {tuple(text.shape)}; it must be [{batch}, n, d]")
        if text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool:
            raise ValueError(
                f"text_mask is {text_mask.dtype} of shape {tuple(text_mask.shape)}; it must be bool "
                f"of shape {tuple(text.shape[:2])}"
            )
        for name, value in [
            ("x0", x0),
            ("text", text),
            *((f"eps[{i}]", e) for i, e in enumerate(eps)),
        ]:
            if not value.is_floating_point():
                raise ValueError(f"{name} has dtype {value.dtype}; it must be floating point")
            readable = value.device.type == "cpu" and not torch.compiler.is_compiling()
            if readable and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values; it must be finite")
