"""Pictures a second and waiting times of `serve`, beside the bare pipeline and beside Ray Serve's own batching, in one run.

    saturation   images/s over HTTP with more clients than places, and what share that is of the bare pipeline: for the pictures
                 that were served, kind by kind in batches of the best size and with texts encoded before, no server around it
    latency      at a share of what both can do, requests coming at random times; the same to the same server whose replica
                 batches with `@serve.batch` (`serving.batched`), in batches of the size that answers soonest
    preview      time to the first preview of a stream over the time to its picture, on an idle server
    overload     for as long as is wanted, a fifth more than can be served, streams and clients that hang up among them

Kinds are the model's resolutions, each with half of its number of steps and with all; all are asked for as often. The weights are
random, and all compute with as many threads. Both servers are there all the time, and one at a time has something to do. The bare
pipeline takes turns of some seconds with the server that is kept full, whose processes stand still meanwhile. Ratios are formed
within a round. Needs Linux.
"""

import asyncio
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines import costs, served
from pipelines.config import Config, UserError
from pipelines.processes import cpu_seconds, family, resident_bytes, titled
from pipelines.served import OURS, PEER
from pipelines.serving import load
from pipelines.serving.load import Answer, Ask, Clients, Kind
from pipelines.session import event

logger = logging.getLogger(__name__)

PEER_BATCH_SIZES = (4, 8, 16)
NUM_PREVIEWS = 3
NUM_STREAMS = 4
"""Of each resolution and round, on the idle server."""
OPEN_LOADS = 3
"""How many times as long waiting times are measured, and compared of batch sizes: a queue takes its time to form, and few
requests have no median."""
TURN_SECONDS = 3.0
PAUSE_SECONDS = 1.0
"""Between two that are measured."""
SOAK_LOAD = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    seconds: float
    "Of each load of a round; three times as long for waiting times."
    rounds: int
    clients: int
    "That ask at once where a server is to be kept full."
    load: float
    "Share of what can be served, for latency; 0 for none."
    soak: float
    "Seconds of overload; 0 for none."
    threads: int
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seconds", "rounds", "clients", "threads"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name} {value:g} must be at least 1")
        if not 0 <= self.load < 1:
            raise UserError(f"--load {self.load:g} must be at least 0 and below 1")
        if self.soak < 0:
            raise UserError(f"--soak {self.soak:g} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saturation:
    """A server that was kept full."""

    bare: float
    "Images/s of the bare pipeline, of the pictures that were served."
    served: float
    "Images/s over HTTP."
    bare_seconds: dict[str, float]
    "Of a picture of each kind."
    cpu_seconds: dict[str, float]
    "Of CPUs for a picture: of the bare pipeline, of the replica, and of all else that serves."


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one round saw."""

    saturation: Saturation
    latency: dict[str, list[tuple[int, float]]]
    "Of both servers: resolution and seconds of every request."
    streams: list[tuple[int, float, float]]
    "Resolution, seconds to the first preview and to the picture."


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """What an overload saw."""

    rate: float
    "Requests a second."
    outcomes: dict[str, int]
    memory: dict[str, list[tuple[float, int]]]
    "Of replica and ingress: seconds since the load began, and resident bytes."


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Everything."""

    batch_sizes: dict[int, int]
    "Of the bare pipeline, for each resolution."
    rate: float
    "Requests a second for latency."
    peer_batch_size: int
    rounds: list[Round]
    soak: Soak | None


def run(settings: Settings, output: str | None = None) -> Result:
    """Measures, prints a table, and returns and writes everything.

    Raises:
        UserError: a setting of the configuration cannot be, or a server answered otherwise than it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = served.configuration(settings.threads, settings.overrides, f"{folder}/bench")
        served.write_run(config)
        with served.both(config) as url:
            bare = served.Bare(config, settings.threads)
            result = asyncio.run(_measure(settings, config, bare, url))
    about = [
        f"{config.model.resolutions[-1]} pixels",
        f"{settings.threads} threads",
        costs.processor(),
    ]
    sys.stdout.write("\n".join([f"serve: {', '.join(about)}", *table(settings, result)]) + "\n")
    if output is not None:
        told = {"settings": asdict(settings), **asdict(result)}
        Path(output).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return result


async def _measure(settings: Settings, config: Config, bare: served.Bare, url: str) -> Result:
    guidance, steps = config.sample.guidance, config.sample.num_steps
    kinds = [Kind(r, n) for r in config.model.resolutions for n in (-(-steps // 2), steps)]
    event(logger, "bare", batch_sizes=list(bare.batch_sizes.values()))
    async with Clients(url, guidance) as ours, Clients(f"{url}/{PEER}", guidance) as peer:
        clients = {OURS: ours, PEER: peer}
        for one in clients.values():
            require_answers(await one.open(itertools.islice(load.mixed(kinds, 0), 2 * len(kinds))))
        full = [
            await _saturate(settings, kinds, bare, ours, number)
            for number in range(settings.rounds)
        ]
        speed = statistics.median(one.served for one in full)
        rate = settings.load * min(speed, statistics.median(one.bare for one in full))
        size = await _tune(settings, kinds, rate, peer) if rate else 0
        rounds = list[Round]()
        for number, saturation in enumerate(full):
            latency = await _wait_times(settings, kinds, rate, clients, number)
            streams = await _streams(config.model.resolutions[1:], steps, ours)
            rounds.append(Round(saturation=saturation, latency=latency, streams=streams))
        soak = await _soak(settings, kinds, SOAK_LOAD * speed, ours) if settings.soak else None
    return Result(
        batch_sizes=bare.batch_sizes, rate=rate, peer_batch_size=size, rounds=rounds, soak=soak
    )


async def _saturate(
    settings: Settings, kinds: Sequence[Kind], bare: served.Bare, ours: Clients, number: int
) -> Saturation:
    """Keeps the server full, and every few seconds has it stand still for a batch of the bare pipeline, of each kind in turn."""
    alone: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
    replica = titled(family(os.getpid()), f"ServeReplica:{OURS}:replica")
    others = [pid for pid in family(os.getpid())[1:] if pid not in replica]

    async def take_turns() -> None:
        for kind in itertools.cycle(kinds):
            await asyncio.sleep(TURN_SECONDS)
            began = time.monotonic()
            alone[kind].append(bare.seconds(kind))
            ours.stood_still += time.monotonic() - began

    before = _computed(replica), _computed(others)
    turns = asyncio.create_task(take_turns())
    kept = await ours.closed(load.mixed(kinds, number + 1), settings.clients, settings.seconds)
    turns.cancel()
    after = _computed(replica), _computed(others)
    require_answers(kept.answers)
    for kind in kinds:
        alone[kind] = alone[kind] or [bare.seconds(kind)]
    await asyncio.sleep(PAUSE_SECONDS)
    by_clock, of_cpus = (
        {kind: statistics.mean(taken[i] for taken in alone[kind]) for kind in kinds} for i in (0, 1)
    )
    num = len(kept.answers)
    found = Saturation(
        bare=len(kept.counted) / sum(by_clock[answer.ask.kind] for answer in kept.counted),
        served=len(kept.counted) / settings.seconds,
        bare_seconds={f"{kind.resolution}x{kind.num_steps}": by_clock[kind] for kind in kinds},
        cpu_seconds={
            "bare": sum(of_cpus[answer.ask.kind] for answer in kept.answers) / num,
            "replica": (after[0] - before[0]) / num,
            "all other processes": (after[1] - before[1]) / num,
        },
    )
    event(logger, "saturated", round=number, bare=found.bare, served=found.served)
    return found


def _computed(pids: Sequence[int]) -> float:
    return sum(map(cpu_seconds, pids))


async def _tune(settings: Settings, kinds: Sequence[Kind], rate: float, peer: Clients) -> int:
    """The batch size with which the peer answers soonest; it is left with that."""
    medians = {}
    for size in PEER_BATCH_SIZES:
        await _resize(size)
        asks = _arriving(kinds, rate, OPEN_LOADS * settings.seconds, seed=1000)
        answers = await peer.open(asks)
        require_answers(answers)
        medians[size] = statistics.median(answer.seconds for answer in answers)
        event(logger, "batched", size=size, median_seconds=medians[size])
    best = min(medians, key=lambda size: medians[size])
    await _resize(best)
    return best


async def _resize(batch_size: int) -> None:
    from ray import serve

    await serve.get_deployment_handle(PEER, PEER).resize.remote(batch_size)


def _arriving(kinds: Sequence[Kind], rate: float, seconds: float, seed: int) -> list[Ask]:
    times = load.arrivals(rate, seconds, seed)
    return [replace(ask, due=due) for due, ask in zip(times, load.mixed(kinds, seed), strict=False)]


async def _wait_times(
    settings: Settings,
    kinds: Sequence[Kind],
    rate: float,
    clients: Mapping[str, Clients],
    number: int,
) -> dict[str, list[tuple[int, float]]]:
    """Of both servers for the same arrivals, in an order that alternates."""
    if not rate:
        return {}
    found = {}
    asks = _arriving(kinds, rate, OPEN_LOADS * settings.seconds, seed=number)
    for name in sorted(clients, reverse=bool(number % 2)):
        answers = await clients[name].open(asks)
        require_answers(answers)
        found[name] = [(answer.ask.kind.resolution, answer.seconds) for answer in answers]
        await asyncio.sleep(PAUSE_SECONDS)
    return found


async def _streams(
    resolutions: Sequence[int], num_steps: int, ours: Clients
) -> list[tuple[int, float, float]]:
    """Of an idle server, one after the other; the first of all does not count."""
    found = []
    for number in range(-1, NUM_STREAMS):
        for resolution in resolutions:
            kind = Kind(resolution, num_steps)
            answer = await ours.one(Ask(kind=kind, number=number + 1, num_previews=NUM_PREVIEWS))
            require_answers([answer])
            if number >= 0 and answer.preview is not None:
                found.append((resolution, answer.preview - answer.began, answer.seconds))
    return found


async def _soak(settings: Settings, kinds: Sequence[Kind], rate: float, ours: Clients) -> Soak:
    """Every fifth asks for a stream, every tenth hangs up within five seconds."""
    asks = [
        replace(
            ask,
            num_previews=NUM_PREVIEWS if i % 5 == 0 else 0,
            patience=0.5 + i % 45 / 10 if i % 10 in (3, 5) and i % 20 < 10 else None,
        )
        for i, ask in enumerate(_arriving(kinds, rate, settings.soak, seed=77))
    ]
    mine = family(os.getpid())
    processes = {
        name: titled(mine, f"ServeReplica:{OURS}:{name}")[0] for name in ("replica", "ingress")
    }
    memory: dict[str, list[tuple[float, int]]] = defaultdict(list)
    began = time.monotonic()

    async def watch() -> None:
        while True:
            for name, pid in processes.items():
                memory[name].append((time.monotonic() - began, resident_bytes(pid)))
            await asyncio.sleep(max(1.0, settings.soak / 60))

    watching = asyncio.create_task(watch())
    answers = await ours.open(asks)
    watching.cancel()
    return Soak(rate=rate, outcomes=load.outcomes(answers), memory=dict(memory))


def require_answers(answers: Sequence[Answer]) -> None:
    """Raises `UserError` unless there are answers, and all are pictures."""
    found = load.outcomes(answers)
    if set(found) != {load.OK}:
        raise UserError(f"a server answered otherwise than with pictures: {found or 'not at all'}")


def table(settings: Settings, result: Result) -> list[str]:
    """Lines for a person."""
    rounds = result.rounds
    full = [one.saturation for one in rounds]
    bare, speeds = [one.bare for one in full], [one.served for one in full]
    cpu = ", ".join(
        f"{name} {statistics.median(one.cpu_seconds[name] for one in full):.3f}"
        for name in full[0].cpu_seconds
    )
    lines = [
        f"saturation   bare, batches of {', '.join(map(str, result.batch_sizes.values()))}: "
        f"{statistics.median(bare):.2f}/s   served: {statistics.median(speeds):.2f}/s   "
        f"served / bare {_spread(costs.ratio(speeds, bare))}",
        f"  CPU seconds of a picture: {cpu}",
        *(_latency_lines(settings, result) if result.rate else ()),
        *_preview_lines(rounds),
    ]
    return [*lines, *(_soak_lines(result.soak) if result.soak else ())]


def _latency_lines(settings: Settings, result: Result) -> Iterator[str]:
    medians: dict[str, list[float]] = {}
    names = {OURS: OURS, PEER: f"@serve.batch({result.peer_batch_size})"}
    yield f"latency      {result.rate:.2f}/s, {settings.load:.0%} of the lower of both; seconds"
    for key, name in names.items():
        of_rounds = [[s for _, s in one.latency[key]] for one in result.rounds]
        medians[key] = [statistics.median(values) for values in of_rounds]
        pooled = [pair for one in result.rounds for pair in one.latency[key]]
        values = [seconds for _, seconds in pooled]
        of_sizes = ", ".join(
            f"{size}: {statistics.median(s for r, s in pooled if r == size):.2f}"
            for size in sorted({r for r, _ in pooled})
        )
        yield (
            f"  {name:18} median {statistics.median(values):6.2f}   95 % {load.percentile(values, 0.95):6.2f}   "
            f"99 % {load.percentile(values, 0.99):6.2f}   medians of sizes {of_sizes}"
        )
    yield f"  ratio of medians   {_spread(costs.ratio(medians[OURS], medians[PEER]))}"


def _preview_lines(rounds: Sequence[Round]) -> Iterator[str]:
    streams = [stream for one in rounds for stream in one.streams]
    for size in sorted({r for r, _, _ in streams}):
        of_size = [(preview, picture) for r, preview, picture in streams if r == size]
        previews, pictures = zip(*of_size, strict=True)
        yield (
            f"preview      {size:4}: first {statistics.median(previews):.3f} s   picture "
            f"{statistics.median(pictures):.3f} s   ratio {_spread(costs.ratio(previews, pictures))}"
        )


def _soak_lines(soak: Soak) -> Iterator[str]:
    told = ", ".join(f"{name}: {number}" for name, number in soak.outcomes.items())
    yield f"overload     {soak.rate:.2f}/s: {told}"
    for name, samples in soak.memory.items():
        first, last, slope = growth(samples)
        yield (
            f"  {name:10} {first / 2**20:7.1f} MiB after a quarter, {last / 2**20:7.1f} at the end, "
            f"{slope * 60 / 2**20:+.2f} a minute"
        )


def growth(samples: Sequence[tuple[float, int]]) -> tuple[int, int, float]:
    """First and last of the bytes after a quarter of the time, in which caches fill, and the slope there, in bytes a second."""
    later = [sample for sample in samples if sample[0] >= samples[-1][0] / 4]
    if len(later) < 2:
        return samples[0][1], samples[-1][1], 0.0
    slope = statistics.linear_regression(*zip(*later, strict=True)).slope
    return later[0][1], later[-1][1], slope


def _spread(spread: costs.Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"
