"""Orders painted in this process by a real small model: events, refusals, replacing the model."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from layered_model import LayeredPipeline
from pipelines.config import load_config
from pipelines.serving.orders import (
    Accepted,
    BadOrder,
    Busy,
    Order,
    Picture,
    Preview,
    TooLate,
    Unavailable,
)
from pipelines.serving.painter import EnginePainter, preview_layers

RED = {"prompt": "a red apple", "resolution": 32, "seed": 7, "num_steps": 8, "guidance": 2.0}


@pytest.fixture(scope="module")
def pipeline(served):
    return LayeredPipeline.from_pretrained(served / "model")


@pytest.fixture(scope="module")
def settings():
    return load_config("demo").serve


@pytest.fixture
def paint(pipeline, settings):
    """Runs ``work(painter)`` in an event loop, with settings changed."""

    def run(work, **changes):
        async def main():
            painter = EnginePainter(pipeline, dataclasses.replace(settings, **changes), "small")
            try:
                return await asyncio.wait_for(work(painter), 60)
            finally:
                await painter.close()

        return asyncio.run(main())

    return run


async def events_of(painter, **changes):
    return [event async for event in painter.draw(Order(**{**RED, **changes}))]


def test_an_order_is_accepted_previewed_and_painted(paint, pipeline):
    first, *previews, last = paint(lambda painter: events_of(painter, num_previews=3))
    assert first == Accepted(0)
    assert [type(event) for event in previews] == [Preview] * 3
    assert [(p.index, p.step, p.pixels.shape[0]) for p in previews] == [
        (0, 2, 8),
        (1, 4, 16),
        (2, 6, 32),
    ]
    assert {p.num_steps for p in previews} == {8}
    assert isinstance(last, Picture)
    assert last.model == pipeline.weights_sha256
    expected = pipeline("a red apple", seed=7, num_steps=8, guidance=2.0).images[32][0]
    assert np.array_equal(last.pixels, np.asarray(expected))


def test_many_orders_at_once_are_each_what_they_are_alone(paint, pipeline):
    orders = [
        {
            "prompt": ("a red apple", "two dogs run", "", "white cat")[i % 4],
            "negative_prompt": ("", "dogs")[i // 3 % 2],
            "seed": i,
            "resolution": (8, 16, 32)[i % 3],
            "num_steps": 2 + i % 5,
            "guidance": (1.0, 3.0, (2.0, 3.0, 4.0))[i // 2 % 3],
            "layer_prompts": {} if i % 6 else {16: "a cat"},
        }
        for i in range(12)
    ]

    async def work(painter):
        alone = [await events_of(painter, **order) for order in orders]
        together = await asyncio.gather(*(events_of(painter, **order) for order in orders))
        return alone, together

    for one, other in zip(*paint(work), strict=True):
        assert np.array_equal(one[-1].pixels, other[-1].pixels)


def test_a_picture_can_be_the_start_or_be_finished(paint, pipeline):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    small = pipeline("a red apple", seed=7, num_steps=8, resolution=8).images[8][0]

    async def work(painter):
        changed = await events_of(painter, image=picture, strength=0.5, num_previews=1)
        finished = await events_of(painter, finish=np.asarray(small), strength=1.0)
        return changed, finished

    changed, finished = paint(work)
    assert changed[1].num_steps == 4
    expected = pipeline(
        "a red apple",
        seed=7,
        num_steps=8,
        guidance=2.0,
        image=torch.from_numpy(picture)[None],
        strength=0.5,
    )
    assert np.array_equal(changed[-1].pixels, np.asarray(expected.images[32][0]))
    # The finished one shrinks to the one that was given, but for the clamps.
    low = finished[-1].pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(low - np.asarray(small, float)).mean() < 25


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": "apple " * 99}, "prompt", "prompt has 100 tokens; the model reads at most 16"),
        ({"negative_prompt": "cat " * 20}, "negative_prompt", "has 21 tokens"),
        ({"layer_prompts": {32: "cat " * 20}}, "layer_prompts[32]", "has 21 tokens"),
        ({"layer_prompts": {64: "cat"}}, "layer_prompts", r"one of \(16, 32\)"),
        ({"resolution": 64}, "resolution", r"resolution=64 must be one of \(8, 16, 32\)"),
        ({"num_steps": 0}, "num_steps", "at least 1"),
        ({"guidance": (1.0, 2.0)}, "guidance", "one scale for each of 3 layers"),
        ({"guidance": float("nan")}, "guidance", "finite"),
        ({"finish": np.zeros((32, 32, 3), np.uint8)}, "finish", r"one of \(8, 16\)"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "image", r"one of \(32,\)"),
        ({"image": np.zeros((32, 32, 3), np.uint8), "strength": 0.0}, "strength", "above 0"),
    ],
)
def test_what_can_never_be_drawn_is_refused_before_it_is_accepted(paint, change, param, message):
    with pytest.raises(BadOrder, match=message) as refused:
        paint(lambda painter: events_of(painter, **change))
    assert refused.value.param == param


def test_a_full_queue_refuses(paint):
    async def work(painter):
        tasks = [asyncio.create_task(events_of(painter, num_steps=50, seed=i)) for i in range(8)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = paint(work, max_images=4, max_pictures=2, max_queued=2)
    refused = [result for result in results if isinstance(result, Busy)]
    assert refused
    assert len(results) - len(refused) >= 4
    assert all(isinstance(result, Busy) or len(result) == 2 for result in results)
    assert all(error.retry_after_seconds >= 1 for error in refused)


def test_a_closed_stream_frees_its_place(paint):
    async def work(painter):
        stream = painter.draw(Order(**{**RED, "num_steps": 200}))
        assert isinstance(await anext(stream), Accepted)
        await stream.aclose()
        await events_of(painter, num_steps=1)
        return painter.load()

    load = paint(work, max_pictures=1)
    assert (load.active, load.waiting) == (0, 0)


def test_a_cancelled_task_frees_its_place(paint):
    async def work(painter):
        task = asyncio.create_task(events_of(painter, num_steps=200))
        while not painter.load().active:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await events_of(painter, num_steps=1)
        return painter.load()

    load = paint(work, max_pictures=1)
    assert (load.active, load.waiting) == (0, 0)


def test_a_deadline_is_kept(paint):
    async def work(painter):
        with pytest.raises(TooLate):
            await events_of(painter, num_steps=250, deadline_seconds=0.05)
        with pytest.raises(TooLate):
            await events_of(painter, num_steps=250, deadline_seconds=999.0)

    paint(work, max_seconds=0.1)


def test_the_check_draws_even_where_everything_is_taken(paint):
    async def work(painter):
        streams = [painter.draw(Order(**{**RED, "num_steps": 250, "seed": i})) for i in range(2)]
        for stream in streams:
            await anext(stream)
        await painter.check()
        for stream in streams:
            await stream.aclose()

    paint(work, max_images=2, max_pictures=1, max_queued=1)


def test_the_check_fails_with_the_engine(pipeline, settings, monkeypatch):
    def broken(network, parts):
        raise RuntimeError("device lost")

    async def main():
        painter = EnginePainter(pipeline, settings, "small")
        monkeypatch.setattr("pipelines.serving.engine.predict_together", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            await painter.check()
        monkeypatch.undo()
        await painter.check()
        await painter.close()
        with pytest.raises(Unavailable):
            await painter.check()
        with pytest.raises(Unavailable):
            await events_of(painter)

    asyncio.run(main())


def test_a_replaced_model_finishes_what_it_had_accepted(paint, pipeline, served):
    other = LayeredPipeline.from_pretrained(served / "model").untrained(3)
    for parameter in other.network.parameters():
        parameter.data.add_(0.02)
    other.weights_sha256 = "new"

    async def work(painter):
        stream = painter.draw(Order(**{**RED, "num_steps": 60}))
        await anext(stream)
        replaced = asyncio.create_task(painter.replace(other, created=5))
        await asyncio.sleep(0)
        new = (await events_of(painter))[-1]
        facts = await painter.facts()
        old = [event async for event in stream][-1]
        await replaced
        return old, new, facts

    old, new, facts = paint(work)
    assert (old.model, new.model) == (pipeline.weights_sha256, "new")
    assert (facts.weights_sha256, facts.created) == ("new", 5)
    assert facts.resolutions == (8, 16, 32)
    assert facts.max_tokens == 16
    assert facts.can_finish


def test_a_known_prompt_is_not_encoded_again(paint, pipeline, monkeypatch):
    encoded, encode = [], pipeline.encode
    monkeypatch.setattr(
        pipeline, "encode", lambda prompts: encoded.append(*prompts) or encode(prompts)
    )

    async def work(painter):
        for prompt in ("cat", "dog", "cat", "cat"):
            await events_of(painter, prompt=prompt, num_steps=1, resolution=8)

    paint(work)
    assert sorted(encoded) == ["", "cat", "dog"]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("num_previews", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_previews_rise_through_the_layers(num_steps, num_previews, num_layers):
    previews = preview_layers(num_steps, num_previews, num_layers)
    steps, layers = list(previews), list(previews.values())
    assert len(steps) == min(num_previews, len(steps))
    assert all(1 <= step < num_steps for step in steps)
    assert steps == sorted(steps)
    assert layers == sorted(layers)
    assert all(0 <= layer < num_layers for layer in layers)
    if steps:
        assert layers[0] == 0
        assert steps[0] <= max(1, -(-num_steps // 4))
