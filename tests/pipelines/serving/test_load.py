"""Clients that load a server: when they ask, what for, and what they see of a server that does all kinds of things."""

import asyncio
import itertools
import statistics

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from pipelines.serving import load
from pipelines.serving.load import Ask, Clients, Kind

KINDS = [Kind(16, 4), Kind(16, 8), Kind(32, 8)]


def test_arrivals_are_a_poisson_process_and_the_same_each_time():
    times = load.arrivals(20.0, 500.0, seed=1)
    assert times == load.arrivals(20.0, 500.0, seed=1) != load.arrivals(20.0, 500.0, seed=2)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 500
    assert len(times) == pytest.approx(10_000, abs=400)  # four deviations
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)


def test_all_kinds_are_asked_for_as_often_and_no_seed_twice():
    asks = list(itertools.islice(load.mixed(KINDS, 3), 90))
    assert all([ask.kind for ask in asks].count(kind) == 30 for kind in KINDS)
    assert len({ask.number for ask in asks}) == 90
    assert [ask.kind for ask in asks] != KINDS * 30
    assert asks == list(itertools.islice(load.mixed(KINDS, 3), 90))


@pytest.fixture
def app():
    """Answers by the seed: 1 is refused, 2 is slow, a stream of 3 has no end."""
    app = FastAPI()
    app.state.most = app.state.now = 0

    @app.post(load.ROUTE)
    async def generate(body: dict):
        app.state.now += 1
        app.state.most = max(app.state.most, app.state.now)
        await asyncio.sleep(5.0 if body["seed"] == 2 else 0.02)
        app.state.now -= 1
        if body["seed"] == 1:
            return JSONResponse({}, 429)
        if not body.get("stream"):
            return {}

        async def events():
            yield ": accepted\n\nevent: image_generation.partial_image\ndata: {}\n\n"
            await asyncio.sleep(0.05)
            if body["seed"] != 3:
                yield "event: image_generation.completed\ndata: {}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture
def asked(app, listening):
    """What clients see of that server."""

    def run(work):
        async def inside(url):
            async with Clients(url, 2.0) as clients:
                return await work(clients)

        with listening(app) as url:
            return asyncio.run(inside(url))

    return run


def test_clients_see_how_each_request_ends(asked):
    asks = [
        Ask(kind=KINDS[0], number=10),
        Ask(kind=KINDS[0], number=1),
        Ask(kind=KINDS[0], number=2, patience=0.2),
        Ask(kind=KINDS[0], number=11, num_previews=2, due=0.3),
        Ask(kind=KINDS[0], number=1, num_previews=2),
        Ask(kind=KINDS[0], number=3, num_previews=2),
    ]
    answers = asked(lambda clients: clients.open(asks))
    outcomes = [answer.outcome for answer in answers]
    assert outcomes == ["200", "429", "hung up", "200", "429", "cut off"]
    stream = answers[3]
    assert stream.began == 0.3 < stream.preview < stream.ended
    assert stream.seconds - (stream.preview - stream.began) > 0.04
    assert load.outcomes(answers) == {"200": 2, "429": 2, "cut off": 1, "hung up": 1}


def test_a_closed_loop_keeps_as_many_on_their_way_and_counts_after_the_first(asked, app):
    asks = load.mixed(KINDS, 1)
    kept = asked(lambda clients: clients.closed(asks, 5, 0.5))
    answers = kept.counted
    assert app.state.most == 5
    assert app.state.now == 0
    assert 20 < len(answers) <= 125
    assert len(kept.answers) >= len(answers) + 5
    assert max(a.ended for a in answers) - min(a.ended for a in answers) <= 0.5


def test_nobody_there_is_a_broken_connection():
    async def ask():
        async with Clients("http://127.0.0.1:9", 2.0) as clients:
            return await clients.one(Ask(kind=KINDS[0], number=1))

    assert asyncio.run(ask()).outcome == "broken"


def test_percentiles_are_values_that_were_there():
    values = [float(i) for i in range(100, 0, -1)]
    assert load.percentile(values, 0.95) == 96
    assert load.percentile(values, 1.0) == 100
    assert load.percentile([3.0], 0.5) == 3
