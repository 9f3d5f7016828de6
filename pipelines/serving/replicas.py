"""Painters on a cluster: a replica is an engine with its model in a process of Ray's; `ReplicaPainter` finds one for each order.

A replica looks every `serve.reload_seconds` whether another model lies in the run's directory, and paints with that from then on;
what it had accepted is finished with the one before. Its health check draws a picture.

An order whose replica is lost is placed with another, which draws the same picture, as long as nothing of it has been shown; once
there were previews its client is told, who may have gone on from them. Refusals are handed over as values: as errors Ray would
log a traceback for each.

Called by `ingress`.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from layered_model import LayeredPipeline
from layered_model.checkpoint import CONFIG_FILE
from pipelines import storage
from pipelines.sections import ServeConfig
from pipelines.serving.orders import (
    Accepted,
    BadOrder,
    Busy,
    Event,
    ModelFacts,
    Order,
    Preview,
    TooLate,
    Unavailable,
    Work,
)
from pipelines.serving.painter import EnginePainter
from pipelines.session import event, setup_logging, warning

logger = logging.getLogger(__name__)

REFUSALS = (BadOrder, Busy, TooLate, Unavailable)
CHECK_SECONDS = 30.0
"""For the picture of a health check, which waits for one pass of the network at most."""

FACTS_SECONDS = 1.0
"""How long what a replica told of its model is believed."""

ANSWER_SECONDS = 10.0
"""Within which a replica must say what its model is, or take an order."""

GRACE_SECONDS = 5.0
"""Past an order's deadline, in which its replica should have said that it is too late."""

SWITCH_SECONDS = 0.0005
"""After which a thread gives way to another. By Python's own 5 ms the engine, which comes back from the network's operations a
thousand times a second, would wait that long whenever a request is looked at."""

PAUSE_SECONDS = 0.5
"""Before an order that was lost is placed again."""


class Replica:
    """A painter in a process of its own.

    Args:
        model: The model's directory; local or ``s3://``.
        name: What clients call it.
        settings: See `ServeConfig`.
    """

    def __init__(self, model: str, name: str, settings: ServeConfig) -> None:
        set_up(settings)
        self._model, self._settings = model, settings
        pipeline, created = load_pipeline(model, settings)
        replica = serve.get_replica_context().replica_id.unique_id
        self._painter = EnginePainter(pipeline, settings, name, created=created, replica=replica)
        self._reloading: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Draws a picture. Called by Ray; what it raises has the replica replaced."""
        if self._reloading is None and self._settings.reload_seconds is not None:
            self._reloading = asyncio.create_task(self._reload_for_ever())
        async with asyncio.timeout(CHECK_SECONDS):
            await self._painter.check()

    async def __del__(self) -> None:
        """Looks for models no longer. Called by Ray, when nothing is left to draw."""
        if self._reloading is not None:
            self._reloading.cancel()

    async def facts(self) -> ModelFacts:
        """The model that paints now."""
        return await self._painter.facts()

    async def work(self) -> Work:
        """What there is to do, and was done."""
        return (await self._painter.work())[0]

    async def draw(self, order: Order) -> AsyncIterator[Event | Exception]:
        """An order's events; a refusal is the last of them."""
        try:
            async with contextlib.aclosing(self._painter.draw(order)) as events:  # type: ignore[type-var]
                async for told in events:
                    yield told
        except REFUSALS as error:
            yield error

    async def _reload_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.reload_seconds or math.inf)
            try:
                await self._reload()
            except Exception as error:
                # Half written, or away for a moment: what is here goes on, and the next look may find it whole.
                warning(logger, "reload", model=self._model, error=error)

    async def _reload(self) -> None:
        lying = await asyncio.to_thread(_weights_sha256, self._model)
        facts = await self._painter.facts()
        if lying == facts.weights_sha256:
            return
        pipeline, created = await asyncio.to_thread(load_pipeline, self._model, self._settings)
        event(logger, "reload", before=facts.weights_sha256[:12], now=pipeline.weights_sha256[:12])
        await self._painter.replace(pipeline, created)


def set_up(settings: ServeConfig) -> None:
    """Makes this process one that draws: its log, and as many threads as it has CPUs."""
    setup_logging()
    sys.setswitchinterval(SWITCH_SECONDS)
    if not settings.use_gpu:
        torch.set_num_threads(max(1, int(settings.cpus_per_replica)))


def load_pipeline(model: str, settings: ServeConfig) -> tuple[LayeredPipeline, int]:
    """A model's directory, ready to draw, and when it was written."""
    pipeline = LayeredPipeline.from_pretrained(model, "cuda" if settings.use_gpu else "cpu")
    pipeline.to(dtype=getattr(torch, settings.precision))
    pipeline.encode(["once, so that the encoder is here"])
    written = storage.modified(storage.join(model, CONFIG_FILE))
    return pipeline, int(written.timestamp())


def _weights_sha256(model: str) -> str:
    """Of the weights that lie there, as the configuration says, which is written last."""
    description = json.loads(storage.read_bytes(storage.join(model, CONFIG_FILE)))
    return str(description["weights_sha256"])


class ReplicaPainter:
    """A `Painter` that has a deployment of `Replica` paint.

    Args:
        handle: Of the deployment.
        settings: See `ServeConfig`.
    """

    def __init__(self, handle: DeploymentHandle, settings: ServeConfig) -> None:
        self._handle, self._settings = handle, settings
        self._facts: ModelFacts | None = None
        self._facts_until = 0.0

    async def facts(self) -> ModelFacts:
        """The model of any replica."""
        if self._facts is None or time.monotonic() > self._facts_until:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    self._facts = await self._handle.facts.remote()
            except (TimeoutError, RayError, RayServeException) as error:
                raise Unavailable("no replica answers") from error
            self._facts_until = time.monotonic() + FACTS_SECONDS
        return self._facts

    async def work(self) -> list[Work]:
        """Of all replicas."""
        try:
            found = await self._handle.broadcast("work").results_async(
                timeout_s=ANSWER_SECONDS, return_exceptions=True
            )
        except (TimeoutError, RayError, RayServeException):
            return []
        return [work for work in found if isinstance(work, Work)]

    def draw(self, order: Order) -> AsyncIterator[Event]:
        """One order's events, see the module."""
        return self._draw(order)

    async def _draw(self, order: Order) -> AsyncIterator[Event]:
        seconds = min(order.deadline_seconds or math.inf, self._settings.max_seconds)
        until = time.monotonic() + seconds
        accepted = shown = False
        while True:
            left = dataclasses.replace(order, deadline_seconds=until - time.monotonic())
            try:
                async with contextlib.aclosing(self._place(left, until)) as events:  # type: ignore[type-var]
                    async for told in events:
                        if isinstance(told, Accepted) and accepted:
                            continue
                        accepted = accepted or isinstance(told, Accepted)
                        shown = shown or isinstance(told, Preview)
                        yield told
                return
            except Busy:
                if not accepted:
                    raise
            except Unavailable as error:
                if shown:
                    raise
                warning(logger, "placed_again", seed=order.seed, reason=error)
            if time.monotonic() + PAUSE_SECONDS > until:
                raise TooLate("the picture was not done before its deadline")
            await asyncio.sleep(PAUSE_SECONDS)

    async def _place(self, order: Order, until: float) -> AsyncIterator[Event]:
        """The events of one replica.

        Raises:
            BadOrder, Busy, TooLate: what the replica said.
            Unavailable: it, or the way there, is lost.
        """
        answers: Any = self._handle.options(stream=True).draw.remote(order)
        wait = ANSWER_SECONDS
        try:
            while True:
                try:
                    async with asyncio.timeout(wait):
                        told = await anext(answers)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise Unavailable("the replica does not answer") from error
                except BackPressureError as error:
                    raise Busy(1.0) from error
                except RayTaskError as error:
                    raise error.cause from error
                except (RayError, RayServeException) as error:
                    raise Unavailable(f"the replica is lost ({type(error).__name__})") from error
                if isinstance(told, Exception):
                    raise told
                yield told
                wait = until + GRACE_SECONDS - time.monotonic()
        finally:
            answers.cancel()
