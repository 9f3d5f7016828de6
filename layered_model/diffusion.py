"""The layered diffusion: pictures, noise and schedules of every layer together, and the training loss.

    x_t,l = alpha_l(t) D_l x0 + sigma_l(t) eps_l

Pictures and noise go through the same operator (see `resample`): with any other pairing the difference of two inputs holds the
clean picture without noise. With shared noise and ``extra = 0``, ``x_t`` of a low layer is ``c_t D x_t,top`` exactly with
``c_t = alpha_l / alpha_top``; with shared noise and unequal ``extra`` two layers' inputs determine the clean low picture, which
is refused unless ``allow_leak``. Called by the training stage, `sampler` and `pipeline`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layered_model import parametrization
from layered_model.loss import Weighting, output_weight
from layered_model.noise import NoiseKind, kernel_of, noise_pyramid
from layered_model.parametrization import Prediction
from layered_model.resample import downscale, upscale
from layered_model.schedules import alpha_sigma, cosine_logsnr, layer_shift


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The process that a model is trained for; stored in its checkpoint."""

    noise: NoiseKind
    "How the layers' noise is related: 'sinc' (one field, sinc-downscaled), 'box' or 'independent'."
    reference_resolution: int
    "Resolution whose schedule is the plain cosine; larger layers are noisier at equal t, lower ones less noisy."
    extra_logsnr: tuple[float, ...] = ()
    "Extra shift of each layer's logsnr, low to high; empty for none."
    allow_leak: bool = False
    "Permits unequal extra shifts under shared noise, which let the network read the clean low picture off its inputs."
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
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min={self.logsnr_min} must be below {self.logsnr_max}")
        if self.layer_weights and (min(self.layer_weights) < 0 or max(self.layer_weights) == 0):
            raise ValueError(f"layer_weights={self.layer_weights} must be >= 0 and not all 0")
        if self.noise != "independent" and len(set(self.extra_logsnr)) > 1 and not self.allow_leak:
            raise ValueError(
                f"extra_logsnr={self.extra_logsnr} must be equal for all layers with shared noise "
                f"(noise={self.noise}): otherwise the clean low picture is a linear combination of "
                "two inputs; set allow_leak=true to study that, or noise=independent"
            )


class LossTerms(NamedTuple):
    """What one batch costs."""

    total: Float[Tensor, ""]
    "Weighted mean over pictures and layers; its gradient trains the network."
    per_layer: Float[Tensor, " layers"]
    "Unweighted mean squared error of each layer's output, detached."


class LayeredDiffusion:
    """Schedules, pyramids and loss for a ladder of resolutions."""

    def __init__(self, config: DiffusionConfig, resolutions: Sequence[int]) -> None:
        for name in ("extra_logsnr", "layer_weights"):
            values = getattr(config, name)
            if values and len(values) != len(resolutions):
                raise ValueError(f"{name}={values} must hold one value for each of {resolutions}")
        self.config = config
        self.resolutions = tuple(resolutions)
        self.kernel = kernel_of(config.noise)
        self.shifts = tuple(
            layer_shift(resolution, config.reference_resolution) + extra
            for resolution, extra in zip(
                resolutions, config.extra_logsnr or [0.0] * len(resolutions), strict=True
            )
        )

    @property
    def one_state(self) -> bool:
        """Whether the pyramid is one diffusion: shared noise and the same extra shift for all layers."""
        return self.config.noise != "independent" and len(set(self.config.extra_logsnr)) <= 1

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
        return cosine_logsnr(t, self.config.logsnr_min, self.config.logsnr_max)

    def alpha_sigma(
        self, t: Float[Tensor, " b"], layer: int
    ) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """A layer's alpha and sigma, ready to multiply pictures."""
        alpha, sigma = alpha_sigma(self.logsnr_ref(t) + self.shifts[layer])
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def pyramid(self, x0: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b c _h _w"]]:
        """The picture at every resolution up to its own, low to high."""
        top = self.resolutions.index(x0.shape[-1])
        return [downscale(x0, r, self.kernel) for r in self.resolutions[: top + 1]]

    def noise(
        self, draw: Callable[[int], Float[Tensor, "b c _h _w"]]
    ) -> list[Float[Tensor, "b c _h _w"]]:
        """Noise of every layer, low to high; `draw` returns fresh white noise of a resolution."""
        return noise_pyramid(draw, self.resolutions, self.config.noise)

    def inputs_from_top(
        self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"]
    ) -> list[Float[Tensor, "b c _h _w"]]:
        """Every layer's noisy picture from the top's: ``c_t D x_t``. Shared noise without extra shifts only."""
        top = self.resolutions.index(x_t.shape[-1])
        alpha_top = self.alpha_sigma(t, top)[0]
        lower = [
            self.alpha_sigma(t, layer)[0] / alpha_top * downscale(x_t, resolution, self.kernel)
            for layer, resolution in enumerate(self.resolutions[:top])
        ]
        return [*lower, x_t]

    def fuse(self, x0: Sequence[Float[Tensor, "b c _h _w"]]) -> Float[Tensor, "b c h w"]:
        """One top picture from every layer's estimate: each layer has the last word on its own band.

        From the bottom up, ``x0 = x0_hi + U(x0_lo - D x0_hi)``: low frequencies of the layer below, high ones of this layer.
        """
        fused = x0[0]
        for x0_layer in x0[1:]:
            correction = fused - downscale(x0_layer, fused.shape[-1], self.kernel)
            fused = x0_layer + upscale(correction, x0_layer.shape[-1], self.kernel)
        return fused

    def loss(
        self,
        network: nn.Module,
        x0: Float[Tensor, "b c h w"],
        eps: Sequence[Float[Tensor, "b c _h _w"]],
        t: Float[Tensor, " b"],
        text: Float[Tensor, "b n d"],
        text_mask: Bool[Tensor, "b n"],
    ) -> LossTerms:
        """Weighted squared error of the network's output, averaged over pixels, pictures and layers.

        Args:
            network: A `layered_model.unet.LayeredUNet` or a wrapper with the same call.
            x0: Clean pictures at the top resolution.
            eps: Noise of every layer, see `noise`.
            t: Times, shared by all layers.
            text: Token embeddings.
            text_mask: Real tokens.
        """
        kind = self.config.prediction
        inputs, targets = [], []
        for layer, (x0_layer, eps_layer) in enumerate(zip(self.pyramid(x0), eps, strict=True)):
            alpha, sigma = self.alpha_sigma(t, layer)
            inputs.append(alpha * x0_layer + sigma * eps_layer)
            targets.append(parametrization.target(kind, x0_layer, eps_layer, alpha, sigma))
        logsnr = self.logsnr_ref(t)
        outputs = network(inputs, logsnr, text, text_mask)
        errors = torch.stack(
            [
                (output.float() - goal).square().mean(dim=(1, 2, 3))
                for output, goal in zip(outputs, targets, strict=True)
            ]
        )
        weights = torch.stack(
            [output_weight(self.config.weighting, kind, logsnr + shift) for shift in self.shifts]
        )
        layer_weights = errors.new_tensor(self.config.layer_weights or [1.0] * len(errors))
        total = ((weights * errors).mean(dim=1) * layer_weights).sum() / layer_weights.sum()
        return LossTerms(total=total, per_layer=errors.detach().mean(dim=1))
