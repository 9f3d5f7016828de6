"""The same server with Ray Serve's own batching in place of the engine: what `bench_serve` compares with.

The interface, the model, the cache of texts, threads and the process in front are those of `ingress`. Orders wait in the queue of
`@serve.batch` until as many are there as a batch may hold, or a few milliseconds have passed; a batch is drawn by the bare
pipeline in a thread, together what has size, steps and guidance in common, and answered when all of it is done. Meanwhile the
next gathers. There are no previews. Called by `bench_serve`.
"""

import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

from ray import serve

from layered_model.images import to_uint8
from layered_model.rows import Prompt, join_prompts
from layered_model.sampler import sample
from pipelines.config import Config
from pipelines.sections import ServeConfig
from pipelines.serving.ingress import (
    INGRESS_REQUESTS,
    in_front,
    name_of,
    require_model,
    resources,
)
from pipelines.serving.orders import (
    Accepted,
    Distribution,
    Event,
    ModelFacts,
    Order,
    Picture,
    Pixels,
    Work,
)
from pipelines.serving.painter import facts_of
from pipelines.serving.replicas import load_pipeline, set_up

WAIT_SECONDS = 0.01
"""For which a batch is waited for, once its first order is there. While one is drawn, the next gathers anyway."""


class BatchedReplica:
    """A painter in a process of its own, with the methods of `replicas.Replica`.

    Args:
        model: The model's directory.
        name: What clients call it.
        settings: See `ServeConfig`.
    """

    def __init__(self, model: str, name: str, settings: ServeConfig) -> None:
        set_up(settings)
        self._pipeline, created = load_pipeline(model, settings)
        self._facts = facts_of(self._pipeline, name, created)
        self._encode = functools.lru_cache(settings.text_cache)(self._encode_anew)

    async def facts(self) -> ModelFacts:
        """The model that paints."""
        return self._facts

    async def work(self) -> Work:
        """Nothing is counted here."""
        nothing = Distribution((), (0,), 0.0)
        return Work(replica="batched", active=0, waiting=0, rows=nothing, seconds=nothing)

    async def resize(self, batch_size: int) -> None:
        """Has batches hold as many orders from now on."""
        self._batch.set_max_batch_size(batch_size)

    async def draw(self, order: Order) -> AsyncIterator[Event]:
        """An order's events, without previews."""
        began = time.monotonic()
        yield Accepted(0)
        pixels = await self._batch(order)
        yield Picture(pixels, self._facts.weights_sha256, time.monotonic() - began)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=WAIT_SECONDS)
    async def _batch(self, orders: list[Order]) -> list[Pixels]:
        return await asyncio.to_thread(self._paint, orders)

    def _paint(self, orders: Sequence[Order]) -> list[Pixels]:
        alike = defaultdict(list)
        for place, order in enumerate(orders):
            alike[order.resolution, order.num_steps, order.guidance].append(place)
        pictures: dict[int, Pixels] = {}
        for places in alike.values():
            pictures |= dict(
                zip(places, self._paint_alike([orders[i] for i in places]), strict=True)
            )
        return [pictures[place] for place in range(len(orders))]

    def _paint_alike(self, orders: Sequence[Order]) -> list[Pixels]:
        first = orders[0]
        text = join_prompts([self._encode(order.prompt) for order in orders])
        drawing = self._pipeline.begin(
            *text,
            [order.seed for order in orders],
            num_steps=first.num_steps,
            guidance=first.guidance,
            resolution=first.resolution,
        )
        return list(to_uint8(sample(drawing)[-1]).cpu().numpy())

    def _encode_anew(self, prompt: str) -> Prompt:
        return self._pipeline.encode([prompt])


def application(config: Config) -> serve.Application:
    """The application of a configuration; `BatchedReplica.resize` says how large its batches are.

    Raises:
        UserError: the run has no model.
    """
    settings = config.serve
    replicas = serve.deployment(
        BatchedReplica,
        name="batched",
        num_replicas=1,
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options=resources(settings),
        logging_config={"enable_access_log": False},
    )
    bound = replicas.bind(require_model(config), name_of(config), settings)
    return in_front(bound, settings)
