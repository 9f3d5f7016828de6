"""The orders of one request, painted at once: all are accepted or none, and what is left is given up when the client goes.

Knows no HTTP. Called by `api`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from pipelines.serving.orders import Accepted, Order, Painter, Picture, Preview, Unavailable


class Gone(RuntimeError):
    """Whoever asked is not there any more."""


class Batch:
    """An asynchronous context; inside all orders are accepted, on leaving it those that are not done are given up.

    Args:
        painter: Paints.
        orders: What.
        gone: Returns when the client has gone, and may be cancelled.

    Raises:
        BadOrder, Busy, TooLate, Unavailable, Gone: on entering and from `events`; of the first order that has one.
    """

    def __init__(
        self,
        painter: Painter,
        orders: Sequence[Order],
        gone: Callable[[], Awaitable[None]],
    ) -> None:
        self._painter, self._orders, self._gone = painter, orders, gone
        self._events = asyncio.Queue[tuple[int, Preview | Picture] | Exception]()
        self._waiting = len(orders)
        self._accepted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: Exception | None = None
        self.num_ahead = 0
        self.began = time.monotonic()

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._paint(i, order)) for i, order in enumerate(self._orders)
        ]
        self._tasks.append(asyncio.create_task(self._watch()))
        try:
            await self._accepted.wait()
            if self._failed:
                raise self._failed
        except BaseException:
            await self._give_up()
            raise
        self.began = time.monotonic()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._give_up()

    async def events(
        self, idle_seconds: float | None = None
    ) -> AsyncIterator[tuple[int, Preview | Picture] | None]:
        """Previews and pictures as they come, each with its order's place; ends after the last picture.

        Args:
            idle_seconds: None is yielded whenever so much time has passed without an event.
        """
        left = len(self._orders)
        while left:
            try:
                event = await asyncio.wait_for(self._events.get(), idle_seconds)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event[1], Picture)
            yield event

    async def _paint(self, index: int, order: Order) -> None:
        stream = self._painter.draw(order)
        try:
            async for event in stream:
                if isinstance(event, Accepted):
                    self._take(event)
                else:
                    self._events.put_nowait((index, event))
                    if isinstance(event, Picture):
                        return
            raise Unavailable("the picture was not finished")
        except Exception as error:
            self._fail(error)
        finally:
            with contextlib.suppress(Exception):
                await stream.aclose()  # type: ignore[attr-defined]

    async def _watch(self) -> None:
        await self._gone()
        self._fail(Gone("the client has gone"))

    def _take(self, accepted: Accepted) -> None:
        self.num_ahead = max(self.num_ahead, accepted.num_ahead)
        self._waiting -= 1
        if not self._waiting:
            self._accepted.set()

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error
        self._events.put_nowait(error)
        self._accepted.set()

    async def _give_up(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
