"""From noise to pictures: one loop for every solver of `steppers`.

With shared noise and no extra shifts the pyramid is one diffusion, so the only state is the noisy picture at the top: each
step derives the lower inputs from it, fuses the layers' estimates into one clean picture (see `denoiser`), and moves on.
Otherwise every layer keeps a state of its own. Step noise of lower layers is the downscaled step noise of the top, so the
layers never part. The last step goes to zero noise, where every solver gives x^; `sampling_times` says where the others go.

    start from a picture      x_t = alpha_t x0 + sigma_t eps, at the first of the last `strength` of the steps
    resolution hand-over      below a logsnr the lowest layer runs alone, with the state z_lo; then the rest of the noise joins:
                              z_hi = (alpha_hi / alpha_lo) U z_lo + sigma_hi e_perp,    e_perp = eps - U D eps
                              and, from a picture, + alpha_hi (x0 - U D x0)

While the top's high band is far below its noise, z_hi is what the whole network would have come to, up to the signal of that
band; e_perp and z_lo are independent, because U D is an orthogonal projection. Called by `pipeline`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layered_model.denoiser import Denoiser
from layered_model.diffusion import LayeredDiffusion, Level, Levels
from layered_model.noise import white_noise
from layered_model.resample import downscale, upscale
from layered_model.rows import LayerRows, Rows, predict
from layered_model.steppers import LayerPicture, Picture, SamplerKind, Stepper, make_stepper


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which steps to take."""

    num_steps: int
    "Steps from noise to a clean picture, each an evaluation of the network (two under guidance, and two for 'heun')."
    sampler: SamplerKind = "dpmpp_2m"
    "Which solver."
    eta: float | None = None
    "Fresh noise per step for 'ddim', from 0 to 1."
    resolution: int | None = None
    "Highest layer to run (early exit); all by default. A smaller one starts from the same noise, downscaled."
    strength: float = 1.0
    "Share of the steps, the last ones, that are taken from a given picture, in (0, 1]."
    hand_over: float | None = None
    "Logsnr of the reference below which the lowest layer runs alone; shared noise only."

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0, up to 1")
        if self.hand_over is not None and math.isnan(self.hand_over):
            raise ValueError(f"hand_over={self.hand_over} must be a logsnr, e.g. -4.0")
        make_stepper(self.sampler, self.eta)


def sampling_times(diffusion: LayeredDiffusion, num_steps: int) -> Float[Tensor, " {num_steps}+1"]:
    """Times of the network evaluations, from noise to nearly clean, and 0 as the end of the last step.

    Even steps in t are even in the angle of the *reference's* cosine. A top layer eight times as large still holds noise of half
    its signal at the last of 25 such steps, and loses its detail in the jump from there. These are even in the angle u of

        sigma / alpha = tan^2(pi u / 2)

    at the geometric middle between the reference and the top; the square puts more steps at both ends. Of exactly known Gaussian
    pictures with a spectrum like that of photographs, 25 steps of DPM-Solver++(2M) then miss the deviations by 3 % instead of
    28 % at 512 pixels (reference 64), and by 2 % instead of 6 % at 32 (reference 16).
    """
    config, middle = diffusion.config, -0.5 * diffusion.shifts[-1]
    ends = torch.tensor([config.logsnr_min, config.logsnr_max], dtype=torch.float64)
    first, last = torch.atan(torch.exp((middle - ends) / 4)).tolist()
    angle = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
    times = diffusion.time_of(middle - 4 * angle.tan().log())
    times[-1] = 0
    return times.float()


class Trajectory:
    """Pictures on their way: what the network must answer next (`states` at `t`), and the step from there (`advance`).

    One solver's evaluations are a list of times; one that takes two a step names each time in between twice. Trajectories at
    different steps may share a batch of the network: join their `states` and `t`, and share out the answer.

    Args:
        diffusion: The model's process.
        plan: Which steps.
        generators: One per picture; alone decides its noise, whatever the batch.
        channels: Of a picture.
        device: Where the states live.
        start: Clean pictures at the plan's resolution to start from; noise alone by default.

    Raises:
        ValueError: if the resolution is not one of the model's, the hand-over needs shared noise, or `start` has another shape.
    """

    def __init__(
        self,
        diffusion: LayeredDiffusion,
        plan: Plan,
        generators: Sequence[torch.Generator],
        channels: int,
        device: torch.device,
        start: Picture | None = None,
    ) -> None:
        self.diffusion, self.plan = diffusion, plan
        self._generators, self._channels, self._device = generators, channels, device
        self._top = diffusion.layers_up_to(plan.resolution)[-1]
        self._times = sampling_times(diffusion, plan.num_steps)
        if start is not None:
            self._check(start)
            skipped = plan.num_steps - max(1, round(plan.strength * plan.num_steps))
            self._times = self._times[skipped:]
        self._evaluations = make_stepper(plan.sampler, plan.eta).evaluations
        inner = self._times[1:-1].repeat_interleave(self._evaluations)
        self._times_asked = torch.cat([self._times[:1], inner, self._times[-1:]]).to(device)
        self._levels = self._levels_asked()
        self._num_low_steps = self._hand_over_after()
        self.index = 0

        noise = self._draw()
        self._high_noise: Picture | None = None
        self._high_start: Picture | None = None
        if self._num_low_steps:
            self._high_noise = self._high_band(noise[self._top])
            self._high_start = None if start is None else self._high_band(start)
        self._layers = self._state_layers()
        self.states = [noise[layer] for layer in self._layers]
        if start is not None:
            clean = diffusion.pyramid(start)
            self.states = [
                level.alpha * clean[layer] + level.sigma * noise[layer]
                for layer in self._layers
                for level in [self.levels.layers[layer]]
            ]
        self._steppers = self._fresh_steppers()

    def __len__(self) -> int:
        """Evaluations in all."""
        return len(self._times_asked) - 1

    @property
    def t(self) -> Float[Tensor, " b"]:
        """Time of the states, one per picture."""
        return self._times_asked[self.index].expand(len(self._generators))

    @property
    def levels(self) -> Levels:
        """Of the states; they share their time, so `Level`s have one row."""
        return self._levels[self.index]

    @property
    def done(self) -> bool:
        """Whether the last estimates were the pictures."""
        return self.index == len(self)

    def advance(self, x0: Sequence[LayerPicture]) -> None:
        """Moves the states on by the estimates of their clean pictures."""
        t = self.levels.layers
        self.index += 1
        if self.done:
            return
        s = self.levels.layers
        noise: list[LayerPicture | None] = [None] * len(self.diffusion.resolutions)
        if self._steppers[0].needs_noise:
            noise = [*self._draw()]
        self.states = [
            stepper.step(x_t, x0_hat, t[layer], s[layer], noise[layer])
            for stepper, x_t, x0_hat, layer in zip(
                self._steppers, self.states, x0, self._layers, strict=True
            )
        ]
        if self._state_layers() != self._layers:
            self._lift()

    def _check(self, start: Picture) -> None:
        side = self.diffusion.resolutions[self._top]
        shape = (len(self._generators), self._channels, side, side)
        if start.shape != shape:
            raise ValueError(f"start has shape {tuple(start.shape)}, but must have {shape}")

    def _hand_over_after(self) -> int:
        if self.plan.hand_over is None or self._top == 0:
            return 0
        if not self.diffusion.one_state:
            raise ValueError(
                f"hand_over={self.plan.hand_over} needs shared noise: with "
                f"noise={self.diffusion.config.noise} every layer has a state of its own"
            )
        logsnr = self.diffusion.logsnr_ref(self._times[:-2])  # the last step is the whole network's
        return int((logsnr < self.plan.hand_over).sum())

    def _state_layers(self) -> range:
        """The layers that have a state at the next evaluation."""
        alone = self.index // self._evaluations < self._num_low_steps
        top = 0 if alone else self._top
        return range(top if self.diffusion.one_state else 0, top + 1)

    def _fresh_steppers(self) -> list[Stepper]:
        return [make_stepper(self.plan.sampler, self.plan.eta) for _ in self._layers]

    def _levels_asked(self) -> list[Levels]:
        """Of all evaluations at once: that saves each many small operations."""
        found, count = self.diffusion.levels(self._times_asked), len(self._generators)
        return [
            Levels(
                found.logsnr[i].expand(count),
                tuple(Level(alpha[i : i + 1], sigma[i : i + 1]) for alpha, sigma in found.layers),
            )
            for i in range(len(found.logsnr))
        ]

    def _draw(self) -> list[LayerPicture]:
        """Fresh noise of every layer of the model, so that no picture depends on where it stops."""
        return self.diffusion.noise(
            lambda r: white_noise(self._generators, self._channels, r).to(self._device)
        )

    def _high_band(self, picture: Picture) -> Picture:
        """What the lowest layer does not see of it."""
        low = downscale(picture, self.diffusion.resolutions[0], self.diffusion.kernel)
        return picture - upscale(low, picture.shape[-1], self.diffusion.kernel)

    def _lift(self) -> None:
        """Hands the lowest layer's state over to the whole network."""
        assert self._high_noise is not None
        low, high = self.levels.layers[0], self.levels.layers[self._top]
        resolution = self.diffusion.resolutions[self._top]
        band = upscale(self.states[0], resolution, self.diffusion.kernel)
        state = high.alpha / low.alpha * band + high.sigma * self._high_noise
        if self._high_start is not None:
            state = state + high.alpha * self._high_start
        self.states = [state]
        self._high_noise = self._high_start = None
        self._layers = self._state_layers()
        self._steppers = self._fresh_steppers()


@dataclass(frozen=True, slots=True)
class Step:
    """What is known after an evaluation of the network."""

    index: int
    "From 0."
    num_evaluations: int
    "In all."
    x0: list[LayerPicture]
    "Estimate of the clean picture for every state, low to high: the top's alone with shared noise."


class Drawing:
    """Pictures being drawn: a `Trajectory` with its `Denoiser`, one row per generator.

    `ask` says what the network must answer, `answer` takes that and moves on. Who has several drawings joins what they ask, see
    `rows`; `sample_steps` has one.

    Args:
        denoiser: Network, prompt and guidance.
        generators: One per picture; alone decides its noise, whatever the batch.
        plan: Which steps.
        start: Clean pictures to start from, see `Trajectory`.

    Raises:
        ValueError: as `Trajectory`, or unless there are as many generators as rows.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        generators: Sequence[torch.Generator],
        plan: Plan,
        start: Picture | None = None,
    ) -> None:
        text = denoiser.prompt.text
        if len(generators) != len(text):
            raise ValueError(
                f"{len(generators)} generators must be as many as prompts: {len(text)}"
            )
        channels = denoiser.network.config.picture_channels
        self.denoiser = denoiser
        self._trajectory = Trajectory(
            denoiser.diffusion, plan, generators, channels, text.device, start
        )

    @property
    def done(self) -> bool:
        """Whether the last estimates were the pictures."""
        return self._trajectory.done

    def __len__(self) -> int:
        """Evaluations in all."""
        return len(self._trajectory)

    @torch.inference_mode()
    def ask(self) -> Rows:
        """What the network must answer now."""
        return self.denoiser.ask(self._trajectory.states, self._trajectory.levels)

    @torch.inference_mode()
    def answer(self, outputs: LayerRows, asked: Rows) -> Step:
        """Moves on by the network's answer."""
        x0 = self.denoiser.answer(outputs, asked, self._trajectory.levels)
        self._trajectory.advance(x0)
        return Step(self._trajectory.index - 1, len(self), x0)


@torch.inference_mode()
def sample_steps(drawing: Drawing) -> Iterator[Step]:
    """Draws to the end, step by step; who has seen enough stops asking."""
    while not drawing.done:
        asked = drawing.ask()
        yield drawing.answer(predict(drawing.denoiser.network, asked), asked)


@torch.inference_mode()
def pictures_of(diffusion: LayeredDiffusion, step: Step) -> list[LayerPicture]:
    """The picture as a step knows it, at every resolution up to the highest, low to high, float in about [-1, 1]."""
    return diffusion.pyramid(step.x0[-1]) if diffusion.one_state else step.x0


def sample(drawing: Drawing, on_step: Callable[[Step], None] | None = None) -> list[LayerPicture]:
    """Drains `sample_steps`, telling each step to `on_step`, and returns `pictures_of` the last."""
    for step in sample_steps(drawing):
        if on_step is not None:
            on_step(step)
    return pictures_of(drawing.denoiser.diffusion, step)
