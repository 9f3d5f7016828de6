"""Clients that load a server, and what they saw of it.

In a closed loop some clients each ask again as soon as they are answered, which shows how much a server can do; in an open loop
requests come at random times, whether earlier ones are answered or not (a Poisson process), which shows how long one waits. Times
are taken from when a request was due, so that a slow server cannot slow down what is asked of it. Answers are read and not
decoded: clients must cost little beside the server they share a machine with. Called by `bench_serve`.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import httpx

ROUTE = "/v1/images/generations"
THINGS = ("apple", "boat", "cat", "dog", "elephant", "fish", "guitar", "house")
COLOURS = ("red", "orange", "yellow", "green", "blue", "violet", "white", "black")
TIMEOUT_SECONDS = 180.0
"""More than a server takes before it says that a picture is too late."""

OK, BUSY = "200", "429"
BROKEN, TIMED_OUT, CUT_OFF, HUNG_UP = "broken", "timed out", "cut off", "hung up"


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides how much work a picture is."""

    resolution: int
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request."""

    kind: Kind
    number: int
    "Its seed, and what decides its prompt."
    due: float = 0.0
    "Seconds after the load began."
    num_previews: int = 0
    "Where there are any, the answer is a stream."
    patience: float | None = None
    "Seconds after which the client hangs up."

    def body(self, guidance: float) -> dict[str, object]:
        """As JSON."""
        colour, thing = self.number % len(COLOURS), self.number // len(COLOURS) % len(THINGS)
        told: dict[str, object] = {
            "prompt": f"a {COLOURS[colour]} {THINGS[thing]}",
            "seed": self.number,
            "size": f"{self.kind.resolution}x{self.kind.resolution}",
            "num_steps": self.kind.num_steps,
            "guidance": guidance,
        }
        return told | (
            {"stream": True, "partial_images": self.num_previews} if self.num_previews else {}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a request; times are seconds after the load began."""

    ask: Ask
    outcome: str
    "A status of HTTP, or what was worse."
    began: float
    "When it was due; in a closed loop when it was sent."
    ended: float
    preview: float | None = None
    "When the first preview came."

    @property
    def seconds(self) -> float:
        """From when it was due to its end."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of keeping a server full."""

    answers: list[Answer]
    "All of them."
    counted: list[Answer]
    "Those that ended while it was full."


def mixed(kinds: Sequence[Kind], seed: int) -> Iterator[Ask]:
    """Requests without end: each kind as often as any other, in an order that looks random."""
    shuffled, numbers = random.Random(seed), count(seed * 1000)
    while True:
        for kind in shuffled.sample(kinds, len(kinds)):
            yield Ask(kind=kind, number=next(numbers))


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests come that know nothing of each other, `rate` a second on average."""
    times, drawn, now = list[float](), random.Random(seed), 0.0
    while (now := now + drawn.expovariate(rate)) < seconds:
        times.append(now)
    return times


class Clients:
    """Those of one server; an asynchronous context.

    Args:
        url: Of the server.
        guidance: Of all requests.
    """

    def __init__(self, url: str, guidance: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=TIMEOUT_SECONDS)
        self._guidance = guidance
        self._began = 0.0
        self.stood_still = 0.0
        """Seconds, added by whoever stops the server for a while; the clock of answers leaves them out."""

    async def __aenter__(self) -> "Clients":
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.__aexit__()

    async def closed(self, asks: Iterator[Ask], num_clients: int, seconds: float) -> Kept:
        """Asks as fast as is answered, and counts the answers of so many seconds after each client had one.

        Those that are on their way at the end are waited for.
        """
        self._begin()
        answers, first = list[Answer](), list[float]()
        last = float("inf")

        async def client() -> None:
            nonlocal last
            is_first = True
            while self._now() < last:
                answers.append(await self._ask(next(asks), self._now()))
                if is_first:
                    is_first = False
                    first.append(self._now())
                    if len(first) == num_clients:
                        last = self._now() + seconds

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return Kept(answers, [one for one in answers if first[-1] < one.ended <= last])

    async def open(self, asks: Iterable[Ask]) -> list[Answer]:
        """Asks when it is time, and returns all answers when the last is there."""
        self._begin()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for ask in asks:
                await asyncio.sleep(max(0.0, ask.due - self._now()))
                tasks.append(group.create_task(self._ask(ask, ask.due)))
        return [task.result() for task in tasks]

    async def one(self, ask: Ask) -> Answer:
        """Asks once."""
        return (await self.open([ask]))[0]

    async def get(self, path: str) -> str:
        """Any other thing."""
        answer = await self._http.get(path)
        return answer.raise_for_status().text

    def _now(self) -> float:
        return time.monotonic() - self._began - self.stood_still

    def _begin(self) -> None:
        self._began, self.stood_still = time.monotonic(), 0.0

    async def _ask(self, ask: Ask, began: float) -> Answer:
        preview = None
        try:
            async with asyncio.timeout(ask.patience):
                if ask.num_previews:
                    outcome, preview = await self._streamed(ask)
                else:
                    answer = await self._http.post(ROUTE, json=ask.body(self._guidance))
                    outcome = str(answer.status_code)
        except TimeoutError:
            outcome = HUNG_UP
        except httpx.TimeoutException:
            outcome = TIMED_OUT
        except httpx.TransportError:
            outcome = BROKEN
        return Answer(ask=ask, outcome=outcome, began=began, ended=self._now(), preview=preview)

    async def _streamed(self, ask: Ask) -> tuple[str, float | None]:
        """How a stream ended, and when its first preview came."""
        preview, last = None, ""
        body = ask.body(self._guidance)
        async with self._http.stream("POST", ROUTE, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    last = line.rpartition(".")[2]
                    if last == "partial_image" and preview is None:
                        preview = self._now()
        if answer.status_code != 200:
            return str(answer.status_code), None
        return OK if last == "completed" else CUT_OFF, preview


def outcomes(answers: Iterable[Answer]) -> dict[str, int]:
    """How many ended how."""
    return dict(sorted(Counter(answer.outcome for answer in answers).items()))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of at least one values does not exceed."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]
