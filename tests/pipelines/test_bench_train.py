"""The benchmark of training: who works when, and what it refuses. A whole run of it is `make bench`'s."""

import multiprocessing
import signal
import time

import pytest

from pipelines import cli
from pipelines.bench_train import Contestant
from pipelines.errors import UserError
from pipelines.processes import family


def count_up(count) -> None:
    child = multiprocessing.get_context("spawn").Process(target=count_on, args=(count,))
    child.start()
    child.join()


def count_on(count) -> None:
    while True:
        count.value += 1
        time.sleep(0.001)


@pytest.fixture
def contestant():
    """A process whose child counts."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    process = context.Process(target=count_up, args=(count,))
    process.start()
    made = Contestant(pid=process.pid, num_images=lambda: count.value, is_alive=process.is_alive)
    yield made
    made.send(signal.SIGKILL)
    process.join()


def test_only_the_one_whose_turn_it_is_works(contestant):
    contestant.wait(10)
    assert len(family(contestant.pid)) >= 2
    contestant.send(signal.SIGSTOP)
    before = contestant.num_images()
    time.sleep(0.2)
    assert contestant.num_images() == before
    assert contestant.turn(0.3) > 0.3
    after = contestant.num_images()
    assert after > before
    contestant.turn(0.0, to_the_line=True)
    assert contestant.num_images() > after
    after = contestant.num_images()
    time.sleep(0.2)
    assert contestant.num_images() == after


def test_one_that_ends_is_not_waited_for(contestant):
    contestant.send(signal.SIGKILL)
    with pytest.raises(UserError, match="ended before"):
        contestant.wait(10**9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--workers", "3", "--threads", "2"], "--workers 3 must divide --threads 2"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--turns", "0"], "--turns 0 must be at least 1"),
        (["train.num_worker=2"], "train.num_worker"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, told, capsys):
    assert cli.main(["bench", "train", *options]) == 2
    assert told in capsys.readouterr().err
