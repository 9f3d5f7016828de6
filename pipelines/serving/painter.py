"""Paints in this process: a model, its text encoder with a cache, and the engine that draws for many at once.

Orders are checked and their texts encoded before they are accepted, so that an accepted order fails only for reasons of the
machine. `EnginePainter.replace` puts another model in place of this one: what was accepted is finished by the old one meanwhile.
Called by `replicas` on a cluster, and by whoever serves from one process.
"""

import asyncio
import functools
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Callable

import torch

from layered_model import LayeredPipeline
from layered_model.images import to_uint8
from layered_model.rows import Prompt
from layered_model.sampler import Drawing, Step, pictures_of
from pipelines.costs import network_macs
from pipelines.sections import ServeConfig
from pipelines.serving.engine import Engine, Job, Load
from pipelines.serving.meters import PASS_ROWS, PASS_SECONDS, Tally
from pipelines.serving.orders import (
    Accepted,
    BadOrder,
    Event,
    ModelFacts,
    Order,
    Picture,
    Pixels,
    Preview,
    Unavailable,
    Work,
)


def preview_layers(num_steps: int, num_previews: int, num_layers: int) -> dict[int, int]:
    """After which steps there is a preview, and of which layer.

    The first comes after a quarter of the steps, when little but the lowest layer's picture has taken shape; the rest at even
    distances up to the end, and from the lowest layer to the highest.

    Returns:
        The layer for each number of steps taken, both rising; fewer than wanted where there are fewer steps.
    """
    wanted = [math.ceil((0.25 + 0.75 * i / num_previews) * num_steps) for i in range(num_previews)]
    steps = sorted({step for step in wanted if step < num_steps})
    return {step: i * num_layers // len(steps) for i, step in enumerate(steps)}


def facts_of(pipeline: LayeredPipeline, name: str, created: int) -> ModelFacts:
    """What a client may know of a model."""
    return ModelFacts(
        name=name,
        weights_sha256=pipeline.weights_sha256,
        resolutions=pipeline.resolutions,
        sampler=pipeline.config.sampling.sampler,
        num_steps=pipeline.config.sampling.num_steps,
        guidance=pipeline.config.sampling.guidance,
        max_tokens=pipeline.config.text.max_tokens,
        can_finish=pipeline.diffusion.one_state,
        created=created,
    )


class Studio:
    """One model at work: its pipeline, its engine in a thread, and the texts it knows.

    Args:
        pipeline: The model, where it computes.
        settings: Places, rows, queue and size of the cache.
        on_pass: Told of each pass's rows and seconds.
    """

    def __init__(
        self,
        pipeline: LayeredPipeline,
        settings: ServeConfig,
        on_pass: Callable[[int, float], None],
    ) -> None:
        self.pipeline = pipeline
        self.engine = Engine(
            pipeline.network,
            max_pictures=settings.max_pictures,
            max_rows=settings.max_rows,
            max_queued=settings.max_queued,
            on_pass=on_pass,
        )
        tokens = pipeline.config.text.max_tokens
        self.costs = {
            r: float(network_macs(pipeline.config.network, tokens, r)) for r in pipeline.resolutions
        }
        "Multiply-adds of a row."
        self._encode = functools.lru_cache(settings.text_cache)(self._encode_anew)
        self._encoding = threading.Lock()
        self.thread = threading.Thread(target=self.engine.run, name="engine", daemon=True)
        self.thread.start()

    def begin(self, order: Order) -> Drawing:
        """The order's drawing.

        Raises:
            BadOrder: it can never be drawn.
        """
        pipeline = self.pipeline
        text = self._text("prompt", order.prompt)
        negative = self._text("negative_prompt", order.negative_prompt)
        own = {
            resolution: self._text(f"layer_prompts[{resolution}]", prompt)
            for resolution, prompt in order.layer_prompts.items()
        }
        image, finish = (
            None if pixels is None else torch.from_numpy(pixels.copy())[None]
            for pixels in (order.image, order.finish)
        )
        try:
            return pipeline.begin(
                *text,
                [order.seed],
                num_steps=order.num_steps,
                guidance=order.guidance,
                negative=negative,
                layer_prompts=own or None,
                resolution=order.resolution,
                image=image,
                finish=finish,
                strength=order.strength,
            )
        except ValueError as error:
            named = re.match(r"[a-z_]+", str(error))
            raise BadOrder(named[0] if named else "", str(error)) from error

    def _text(self, name: str, prompt: str) -> Prompt:
        """A prompt's embeddings; none for an empty one."""
        limit = self.pipeline.config.text.max_tokens
        count = self.pipeline.text_encoder.count(prompt)
        if count > limit:
            raise BadOrder(name, f"{name} has {count} tokens; the model reads at most {limit}")
        return self._encode(prompt)

    def _encode_anew(self, prompt: str) -> Prompt:
        with self._encoding:
            return self.pipeline.encode([prompt])


class EnginePainter:
    """A `Painter` in this process.

    Args:
        pipeline: The model, where and in which precision it computes.
        settings: See `ServeConfig`.
        name: What clients call the model.
        created: When its weights were written, in seconds since 1970.
        replica: Names this painter among others of the model.
    """

    def __init__(
        self,
        pipeline: LayeredPipeline,
        settings: ServeConfig,
        name: str,
        *,
        created: int = 0,
        replica: str = "0",
    ) -> None:
        self.settings, self.name = settings, name
        self._replica = replica
        self._rows, self._seconds = Tally(PASS_ROWS), Tally(PASS_SECONDS)
        self._created = created
        self._studio = Studio(pipeline, settings, self._on_pass)

    async def facts(self) -> ModelFacts:
        """The model that paints now."""
        return facts_of(self._studio.pipeline, self.name, self._created)

    def load(self) -> Load:
        """How much there is to do now."""
        return self._studio.engine.load

    async def work(self) -> list[Work]:
        """What the engine does and has done; also of models that were replaced."""
        load = self.load()
        return [
            Work(
                replica=self._replica,
                active=load.active,
                waiting=load.waiting,
                rows=self._rows.distribution(),
                seconds=self._seconds.distribution(),
            )
        ]

    def _on_pass(self, rows: int, seconds: float) -> None:
        self._rows.add(rows)
        self._seconds.add(seconds)

    def draw(self, order: Order) -> AsyncIterator[Event]:
        """One order's events, see `orders`."""
        return self._draw(order)

    async def check(self) -> None:
        """Draws a small picture, before all orders.

        Raises:
            Unavailable: the engine did not draw it.
        """
        studio = self._studio
        if not studio.thread.is_alive():
            raise Unavailable("the engine has stopped")
        smallest = studio.pipeline.resolutions[0]
        order = Order(prompt="", resolution=smallest, seed=0, num_steps=1, guidance=1.0)
        async for event in self._draw(order, urgent=True):
            if isinstance(event, Picture):
                return

    async def replace(self, pipeline: LayeredPipeline, created: int = 0) -> None:
        """Paints with another model from now on; returns when the one before has finished what it had accepted."""
        # It counts multiply-adds, which takes a large network a moment, and orders are taken meanwhile.
        studio = await asyncio.to_thread(Studio, pipeline, self.settings, self._on_pass)
        before, self._studio = self._studio, studio
        self._created = created
        await _finish(before)

    async def close(self) -> None:
        """Accepts no more orders, and returns when all that were accepted are done."""
        await _finish(self._studio)

    async def _draw(self, order: Order, urgent: bool = False) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | Exception]()

        def tell(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        engine, job, num_ahead = await self._place(order, tell, urgent)
        try:
            yield Accepted(num_ahead)
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Picture):
                    return
        finally:
            engine.cancel(job)

    async def _place(
        self, order: Order, tell: Callable[[Event | Exception], None], urgent: bool
    ) -> tuple[Engine, Job, int]:
        """Places an order with the model of now; returns also how many wait before it."""
        studio = self._studio
        if not urgent:
            studio.engine.require_room()
        drawing = await asyncio.to_thread(studio.begin, order)
        start = time.monotonic()
        seconds = min(order.deadline_seconds or math.inf, self.settings.max_seconds)
        job = Job(
            drawing=drawing,
            deadline=start + seconds,
            on_step=_listener(order, drawing, studio.pipeline, start, tell),
            on_failure=tell,
            cost=studio.costs[order.resolution] * (1 + drawing.denoiser.guidance.acts),
            urgent=urgent,
        )
        try:
            return studio.engine, job, studio.engine.submit(job)
        except Unavailable:
            if studio is self._studio:
                raise
            return await self._place(order, tell, urgent)  # replaced in the meantime


def _listener(
    order: Order,
    drawing: Drawing,
    pipeline: LayeredPipeline,
    start: float,
    tell: Callable[[Event], None],
) -> Callable[[Step], None]:
    """Makes events of an order's steps."""
    diffusion = pipeline.diffusion
    layers = diffusion.layers_up_to(order.resolution)
    previews = preview_layers(len(drawing), order.num_previews, len(layers))
    places = {step: index for index, step in enumerate(previews)}

    def pixels(step: Step, layer: int) -> Pixels:
        picture: Pixels = to_uint8(pictures_of(diffusion, step)[layer])[0].cpu().numpy()
        return picture

    def on_step(step: Step) -> None:
        taken = step.index + 1
        if taken == step.num_evaluations:
            seconds = time.monotonic() - start
            tell(Picture(pixels(step, layers[-1]), pipeline.weights_sha256, seconds))
        elif taken in previews:
            shown = pixels(step, previews[taken])
            tell(Preview(places[taken], taken, step.num_evaluations, shown))

    return on_step


async def _finish(studio: Studio) -> None:
    studio.engine.close()
    while studio.thread.is_alive():
        await asyncio.to_thread(studio.thread.join, 1.0)
