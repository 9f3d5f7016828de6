"""The engine on a real small network: who shares passes, who goes first, who is told what."""

import threading

import pytest
import torch

from layered_model import LayeredPipeline
from layered_model.rows import Prompt
from layered_model.sampler import pictures_of
from pipelines.serving import engine as module
from pipelines.serving.engine import Engine, Job
from pipelines.serving.orders import Busy, TooLate, Unavailable

SETTINGS = {"max_pictures": 4, "max_rows": 4, "max_queued": 8}


@pytest.fixture(scope="module")
def pipeline(served):
    return LayeredPipeline.from_pretrained(served / "model")


class Clock:
    """Stands still unless told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def passes():
    """Rows of each pass."""
    return []


@pytest.fixture
def engine(pipeline, clock, passes):
    def make(**settings):
        return Engine(
            pipeline.network,
            **{**SETTINGS, **settings},
            clock=clock,
            on_pass=lambda rows, seconds: passes.append(rows),
        )

    return make


class Told:
    """A job and what it was told."""

    def __init__(self, drawing, **options):
        self.steps, self.failures = [], []
        self.job = Job(
            drawing=drawing,
            deadline=options.pop("deadline", 1e9),
            on_step=self.steps.append,
            on_failure=self.failures.append,
            **options,
        )

    @property
    def done(self):
        return bool(self.steps) and self.steps[-1].index + 1 == self.steps[-1].num_evaluations


@pytest.fixture
def order(pipeline):
    """Makes jobs: ``order(seed=3, num_steps=5, guidance=2.0, resolution=16)``."""

    def make(seed=0, *, num_steps=4, guidance=2.0, resolution=32, value=1.0, **options):
        generator = torch.Generator().manual_seed(int(value * 1000))
        text = value * torch.randn(1, 16, 24, generator=generator)
        drawing = pipeline.begin(
            text,
            torch.arange(16)[None] < 5,
            [seed],
            num_steps=num_steps,
            guidance=guidance,
            resolution=resolution,
        )
        return Told(drawing, **options)

    return make


def drain(engine):
    for _ in range(1000):
        if not engine.tick():
            return
    raise AssertionError("the engine does not end")


def final(pipeline, told):
    return pictures_of(pipeline.diffusion, told.steps[-1])


# What is drawn.


def test_a_picture_has_the_same_bits_whatever_shares_its_passes(pipeline, engine, order):
    kinds = [
        {
            "seed": i,
            "num_steps": 3 + i % 4,
            "guidance": (1.0, 2.0, 5.5)[i % 3],
            "resolution": (8, 16, 32)[i // 2 % 3],
            "value": 1.0 + i % 5,
        }
        for i in range(14)
    ]
    alone = []
    for kind in kinds:
        told = order(**kind)
        machine = engine()
        machine.submit(told.job)
        drain(machine)
        alone.append(final(pipeline, told))
    machine = engine(max_pictures=9, max_rows=8, max_queued=20)
    together = [order(**kind) for kind in kinds]
    for told in together[:5]:
        machine.submit(told.job)
    machine.tick()
    for told in together[5:]:  # they join pictures that are on their way
        machine.submit(told.job)
    drain(machine)
    for told, expected in zip(together, alone, strict=True):
        for one, other in zip(final(pipeline, told), expected, strict=True):
            assert torch.equal(one, other)


def test_a_picture_is_the_pipelines_own(pipeline, engine, order):
    text = Prompt(torch.randn(1, 16, 24), torch.ones(1, 16) > 0)
    drawing = pipeline.begin(*text, [7], num_steps=5, guidance=3.0)
    told = Told(drawing)
    machine = engine()
    for other in (told, order(1), order(2)):
        machine.submit(other.job)
    drain(machine)
    expected = pipeline.sample(*text, [7], num_steps=5, guidance=3.0)
    for x0 in final(pipeline, told):
        pixels = ((x0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        assert torch.equal(pixels.permute(0, 2, 3, 1), expected[x0.shape[-1]])


# Who shares passes, and who goes first.


def test_pictures_at_different_steps_share_passes(engine, order, passes):
    machine, first, second = engine(), order(1, num_steps=4), order(2, num_steps=4)
    machine.submit(first.job)
    machine.tick()
    machine.submit(second.job)
    drain(machine)
    assert passes == [2, 4, 4, 4, 2]
    assert first.done
    assert second.done


def test_a_pass_holds_as_many_rows_as_it_may(engine, order, passes):
    machine = engine()
    for seed in range(3):
        machine.submit(order(seed, num_steps=2).job)
    for seed in range(2):
        machine.submit(order(seed, num_steps=2, guidance=1.0, resolution=16).job)
    drain(machine)
    assert max(passes) == 4
    assert sum(passes) == 3 * 2 * 2 + 2 * 2


@pytest.fixture
def tick(clock):
    """One pass of a machine, which takes a second and knows it."""

    def run(machine):
        machine._on_pass = lambda rows, seconds: setattr(clock, "now", clock.now + 1)
        machine.tick()
        machine._seconds_per_cost = 1.0

    return run


def test_of_equal_pictures_who_came_first_is_done_first(engine, order, tick):
    machine, told = engine(max_rows=2), [order(seed, num_steps=3) for seed in range(3)]
    for each in told:
        machine.submit(each.job)
    for _ in range(6):
        tick(machine)
    assert [len(each.steps) for each in told] == [3, 3, 0]


def test_a_short_picture_does_not_wait_for_long_ones(engine, order, tick):
    machine = engine(max_rows=2, max_pictures=8)
    machine._seconds_per_cost = 1.0
    many = [order(seed, num_steps=20) for seed in range(4)]
    for each in many:
        machine.submit(each.job)
    for _ in range(5):
        tick(machine)
    late = order(9, num_steps=3, resolution=8)
    machine.submit(late.job)
    for _ in range(3):
        tick(machine)
    assert late.done
    assert sum(len(each.steps) for each in many) == 5


def test_a_long_picture_does_not_wait_for_ever_for_short_ones(engine, order, tick):
    machine = engine(max_rows=2, max_pictures=4)
    machine._seconds_per_cost = 1.0
    long = order(0, num_steps=4)  # due after 20 seconds
    machine.submit(long.job)
    for seed in range(1, 13):  # as many as the device can do
        machine.submit(order(seed, num_steps=2, resolution=8).job)
        tick(machine)
        tick(machine)
    assert long.done


def test_a_free_place_goes_to_who_is_due_first(engine, order):
    machine = engine(max_pictures=1)
    machine._seconds_per_cost = 1.0
    many = [order(seed, num_steps=6) for seed in range(2)]
    short = order(9, num_steps=2, resolution=8)
    for each in (*many, short):
        machine.submit(each.job)
    while not many[0].done:
        machine.tick()
    while not short.done:
        machine.tick()
    assert not many[1].steps


def test_a_step_that_costs_more_makes_a_picture_due_later(engine, order):
    machine = engine(max_rows=2)
    machine._seconds_per_cost = 1.0
    dear, cheap = order(0, num_steps=2, cost=3.0), order(1, num_steps=4, resolution=8)
    machine.submit(dear.job)
    machine.submit(cheap.job)
    while not cheap.done:
        machine.tick()
    assert not dear.steps


def test_pictures_of_all_resolutions_share_passes(engine, order, passes):
    machine = engine(max_rows=8)
    for resolution in (8, 32, 16):
        machine.submit(order(resolution, num_steps=2, resolution=resolution).job)
    drain(machine)
    assert passes == [6, 6]


def test_who_waits_longest_comes_first(engine, order):
    machine, told = engine(max_pictures=1), [order(seed, num_steps=2) for seed in range(3)]
    for each in told:
        machine.submit(each.job)
    finished = []
    while len(finished) < 3:
        machine.tick()
        finished += [each for each in told if each.done and each not in finished]
    assert finished == told


def test_an_urgent_job_goes_before_all_and_needs_no_place(engine, order):
    machine = engine(max_pictures=1, max_rows=2, max_queued=1)
    first, waiting = order(1), order(2)
    machine.submit(first.job)
    machine.tick()
    machine.submit(waiting.job)
    urgent = order(3, num_steps=1, resolution=8, urgent=True)
    machine.submit(urgent.job)
    machine.tick()
    assert urgent.done
    assert len(first.steps) == 1


# The queue, and who leaves early.


def test_a_full_queue_refuses_and_says_when_to_come_again(engine, order, clock):
    machine = engine(max_pictures=1, max_queued=2)
    assert machine.submit(order(0).job) == 0
    machine.tick()
    assert machine.submit(order(1).job) == 0
    assert machine.submit(order(2).job) == 1
    with pytest.raises(Busy) as refused:
        machine.submit(order(3).job)
    assert 1 <= refused.value.retry_after_seconds <= module.MAX_RETRY_SECONDS
    assert machine.load == module.Load(active=1, waiting=2)
    drain(machine)
    machine.require_room()


def test_a_cancelled_job_leaves_at_once(engine, order):
    machine = engine(max_pictures=1)
    first, second, third = (order(seed) for seed in range(3))
    for each in (first, second, third):
        machine.submit(each.job)
    machine.tick()
    machine.cancel(second.job)
    assert machine.load.waiting == 1
    machine.cancel(first.job)
    drain(machine)
    assert [len(each.steps) for each in (first, second, third)] == [1, 0, 4]
    assert not first.failures


def test_a_deadline_ends_who_waits_and_who_is_on_the_way(engine, order, clock):
    machine = engine(max_pictures=1)
    active, waiting, patient = order(0, deadline=5.0), order(1, deadline=5.0), order(2)
    for each in (active, waiting, patient):
        machine.submit(each.job)
    machine.tick()
    clock.now = 6.0
    drain(machine)
    assert [type(each.failures[0]) for each in (active, waiting)] == [TooLate, TooLate]
    assert len(active.steps) == 1
    assert patient.done


# When something fails.


def test_a_failing_picture_takes_no_other_with_it(engine, order, monkeypatch, caplog):
    machine = engine(max_rows=8)
    bad, good = order(1, value=9.0), [order(2), order(3)]
    real = module.predict_together

    def predict_together(network, parts):
        if any((rows.prompt.text.abs() > 15).any() for rows in parts):
            raise RuntimeError("out of memory")
        return real(network, parts)

    monkeypatch.setattr(module, "predict_together", predict_together)
    for each in (good[0], bad, good[1]):
        machine.submit(each.job)
    drain(machine)
    assert all(each.done for each in good)
    assert str(bad.failures[0]) == "out of memory"
    assert "pass_failed" in caplog.text


def test_a_listener_that_fails_ends_its_own_picture_alone(engine, order):
    machine, bad, good = engine(), order(1), order(2)

    def gone(step):
        raise RuntimeError("loop is closed")

    bad.job.on_step = bad.job.on_failure = gone
    machine.submit(bad.job)
    machine.submit(good.job)
    drain(machine)
    assert good.done
    assert machine.load == module.Load(0, 0)


def test_a_closed_engine_ends_what_it_has_and_takes_no_more(pipeline, order):
    machine = Engine(pipeline.network, **SETTINGS)
    thread = threading.Thread(target=machine.run)
    thread.start()
    told = [order(seed) for seed in range(6)]
    for each in told:
        machine.submit(each.job)
    machine.close()
    with pytest.raises(Unavailable):
        machine.submit(order(9).job)
    thread.join(60)
    assert not thread.is_alive()
    assert all(each.done for each in told)


def test_pictures_may_come_from_many_threads(pipeline, order):
    machine = Engine(pipeline.network, max_pictures=4, max_rows=4, max_queued=100)
    thread = threading.Thread(target=machine.run)
    thread.start()
    told = [order(seed, num_steps=2, resolution=8) for seed in range(40)]

    def submit(part):
        for each in part:
            machine.submit(each.job)
            if each.job.drawing.done:
                machine.cancel(each.job)

    clients = [threading.Thread(target=submit, args=(told[i::4],)) for i in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    machine.close()
    thread.join(60)
    assert not thread.is_alive()
    assert all(each.done for each in told)
