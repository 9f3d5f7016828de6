"""Continuous batching at the denoising step: many pictures on their way share passes of one network.

Each tick is one pass. Who is waiting takes a free place, the pictures that go next are asked what the network must answer, the
network answers all of them at once, and who is done leaves. So a picture starts at the next step after its order and never waits
for others to end, whatever its number of steps, guidance, text or resolution: layers are computed for the rows that need them.

    who goes            those due first, as many as there is room for in a pass
    who takes a place   whoever waits and is due first
    when one is due     a time after its order that is `STRETCH` times what its steps take

So a small picture does not wait for large ones that came before it, none waits for ever, and among equals who came first is done
first: taking turns would let all end late, since a pass of two takes a CPU, or a full GPU, nearly twice as long as a pass of one.

What a picture looks like depends on none of this, see `layered_model.rows`. The engine knows neither HTTP nor Ray nor asyncio:
jobs are told of their steps in the engine's thread. Called by `painter`.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from layered_model.rows import LayerRows, Rows, predict_together
from layered_model.sampler import Drawing, Step
from layered_model.unet import Network
from pipelines.serving.orders import Busy, TooLate, Unavailable

logger = logging.getLogger(__name__)

STRETCH = 5.0
"""How many times as long as its share of full passes a picture may take: large ones make room for smaller ones that long."""

MAX_RETRY_SECONDS = 60.0
"""Longest time after which who finds the queue full is told to come again."""


@dataclass(eq=False, slots=True)
class Job:
    """A drawing for the engine."""

    drawing: Drawing
    "What is drawn; the engine's alone from now on."
    deadline: float
    "On the engine's clock; a job that is not done by then fails with `TooLate`."
    on_step: Callable[[Step], None]
    "Told of every step, the last included, in the engine's thread."
    on_failure: Callable[[Exception], None]
    "Told once why there will be no more steps; not of cancelling."
    cost: float = 1.0
    "Of one step, beside those of other jobs."
    urgent: bool = False
    "Goes before all others and needs no place: for a look whether the engine works."
    cancelled: bool = field(default=False, init=False)
    asked: Rows | None = field(default=None, init=False)
    due: float = field(default=0.0, init=False)
    "When it should be done, on the engine's clock; says only who goes first."


@dataclass(frozen=True, slots=True)
class Load:
    """How much there is to do."""

    active: int
    "Pictures on their way."
    waiting: int
    "Pictures that wait for a place."


class Engine:
    """Draws jobs with one network.

    Args:
        network: What answers; all drawings are of it.
        max_pictures: Places: pictures on their way at once.
        max_rows: Rows of a pass; a guided picture has two.
        max_queued: Jobs that may wait for a place.
        on_pass: Told of each pass's rows and seconds.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        network: Network,
        *,
        max_pictures: int,
        max_rows: int,
        max_queued: int,
        on_pass: Callable[[int, float], None] = lambda rows, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._network, self._on_pass = network, on_pass
        self._max_pictures, self._max_rows, self._max_queued = max_pictures, max_rows, max_queued
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._active: list[Job] = []
        self._closed = False
        self._seconds_per_cost = 0.0
        self._seconds, self._seconds_at_end, self._seconds_per_job = 0.0, 0.0, 1.0

    @property
    def load(self) -> Load:
        """How much there is to do now."""
        with self._changed:
            return Load(len(self._active), len(self._waiting))

    def require_room(self) -> None:
        """Raises what `submit` would for an ordinary job, to save the work of making one."""
        with self._changed:
            self._require_room()

    def submit(self, job: Job) -> int:
        """Takes a job.

        Returns:
            How many were waiting before it.

        Raises:
            Busy: as many are waiting as may.
            Unavailable: the engine is closed.
        """
        with self._changed:
            if not job.urgent:
                self._require_room()
            seconds = job.cost * len(job.drawing) * self._seconds_per_cost
            job.due = self.clock() + STRETCH * seconds
            ahead = len(self._waiting)
            self._waiting.append(job)
            self._changed.notify_all()
        return ahead

    def cancel(self, job: Job) -> None:
        """Gives a job up, if it is not done: its place is free at the next pass."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Takes no more jobs; `run` returns when those that it has are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def run(self) -> None:
        """Ticks until closed and done; sleeps while there is nothing to do."""
        while True:
            if self.tick():
                continue
            with self._changed:
                if self._closed and not self._waiting:
                    return
                self._changed.wait_for(lambda: self._waiting or self._closed)

    def tick(self) -> bool:
        """One pass of the network; False where there was nothing to do."""
        self._drop_the_late()
        self._give_places()
        jobs = self._choose()
        if not jobs:
            return bool(self._active)
        start = self.clock()
        self._pass(jobs)
        seconds = self.clock() - start
        self._seconds += seconds
        now = seconds / sum(job.cost for job in jobs)
        before = self._seconds_per_cost or now
        with self._changed:  # who submits reads it
            self._seconds_per_cost = before + 0.1 * (now - before)
        return True

    def _require_room(self) -> None:
        if self._closed:
            raise Unavailable("the engine is being closed")
        if len(self._waiting) + len(self._active) >= self._max_queued + self._max_pictures:
            wait = len(self._waiting) * self._seconds_per_job
            raise Busy(min(max(wait, 1.0), MAX_RETRY_SECONDS))

    def _drop_the_late(self) -> None:
        now = self.clock()
        with self._changed:
            late = [job for job in (*self._waiting, *self._active) if job.deadline <= now]
            self._waiting = [job for job in self._waiting if job.deadline > now]
            self._active = [job for job in self._active if job.deadline > now and not job.cancelled]
        for job in late:
            if not job.cancelled:
                _tell(job.on_failure, TooLate("the picture was not done before its deadline"))

    def _give_places(self) -> None:
        with self._changed:
            while job := self._next_waiting():
                self._waiting.remove(job)
                self._active.append(job)

    def _next_waiting(self) -> Job | None:
        first = min(self._waiting, key=_order, default=None)
        full = len(self._active) >= self._max_pictures
        return None if first is None or (full and not first.urgent) else first

    def _choose(self) -> list[Job]:
        """Who goes next, together in one pass; each has said what it asks."""
        chosen: list[Job] = []
        rows = 0
        for job in sorted(self._active, key=_order):
            if not self._asks(job):
                continue
            assert job.asked is not None
            rows += len(job.asked.logsnr)
            if chosen and rows > self._max_rows:
                break
            chosen.append(job)
        return chosen

    def _asks(self, job: Job) -> bool:
        """Whether the job could say what it asks; it has failed otherwise."""
        try:
            job.asked = job.asked or job.drawing.ask()
        except Exception as error:
            self._fail(job, error)
            return False
        return True

    def _pass(self, jobs: list[Job]) -> None:
        """One pass for all; where that fails, one for each, so that nobody fails for another."""
        asked = [job.asked for job in jobs if job.asked is not None]
        start = self.clock()
        try:
            outputs = predict_together(self._network, asked)
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            logger.warning("pass_failed pictures=%d error=%r", len(jobs), error)
            for job in jobs:
                self._pass([job])
            return
        for job, part in zip(jobs, outputs, strict=True):
            self._step(job, part)
        self._on_pass(sum(len(rows.logsnr) for rows in asked), self.clock() - start)

    def _step(self, job: Job, outputs: LayerRows) -> None:
        assert job.asked is not None
        try:
            step = job.drawing.answer(outputs, job.asked)
            job.asked = None
            if job.drawing.done:
                self._leave(job)
            if not job.cancelled:
                job.on_step(step)
        except Exception as error:
            self._fail(job, error)

    def _leave(self, job: Job) -> None:
        with self._changed:
            if job in self._active:
                self._active.remove(job)
        if not job.urgent:
            since, self._seconds_at_end = self._seconds - self._seconds_at_end, self._seconds
            self._seconds_per_job += 0.1 * (since - self._seconds_per_job)

    def _fail(self, job: Job, error: Exception) -> None:
        logger.error("picture_failed error=%r", error, exc_info=error)
        self._leave(job)
        _tell(job.on_failure, error)


def _order(job: Job) -> tuple[bool, float]:
    return not job.urgent, job.due


def _tell(listener: Callable[[Exception], None], error: Exception) -> None:
    """A listener that is gone must not stop the engine."""
    try:
        listener(error)
    except Exception:
        logger.exception("listener_failed")
