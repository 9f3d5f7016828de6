"""Checkpoints are there whole or not at all, are checked when they are read, and are kept by the rule."""

import logging
import subprocess
import threading

import pytest
import torch

from pipelines.checkpoints import ABOUT_FILE, STATE_FILE, About, Rule, Store, Writer, copied


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "checkpoints"))


def state(value: float) -> dict:
    return {"num_images": int(value), "weights": {"w": torch.full((1000,), float(value))}}


def numbers(store: Store) -> list[int]:
    return [about.num_images for about in store.all()]


def test_what_is_written_is_read(store) -> None:
    assert store.read_newest() is None
    for value in (200, 100, 300):
        store.write(value, state(value), loss=1 / value)
    assert numbers(store) == [100, 200, 300]
    assert [about.validation_loss for about in store.all()] == [1 / 100, 1 / 200, 1 / 300]
    newest = store.read_newest()
    assert newest["num_images"] == 300
    assert torch.equal(newest["weights"]["w"], torch.full((1000,), 300.0))
    store.write(300, state(7))
    assert store.read_newest()["weights"]["w"][0] == 7


def test_what_an_interrupted_write_left_is_none(store, tmp_path) -> None:
    store.write(100, state(100))
    store.write(200, state(200))
    (tmp_path / "checkpoints/000000000200" / ABOUT_FILE).unlink()
    assert numbers(store) == [100]
    assert store.read_newest()["num_images"] == 100
    store.prune(Rule(num_newest=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000100"]


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_one_falls_back_to_the_one_before_with_a_warning(
    store, tmp_path, caplog, damage
) -> None:
    for value in (100, 200, 300):
        store.write(value, state(value))
    damage(tmp_path / "checkpoints/000000000300" / STATE_FILE)
    with caplog.at_level(logging.WARNING):
        assert store.read_newest()["num_images"] == 200
    assert "damaged_checkpoint" in caplog.text
    assert "000000000300" in caplog.text
    with pytest.raises((OSError, ValueError)):
        store.read(300)


def about(num_images: int, loss: float | None = None) -> About:
    return About(num_images=num_images, bytes=1, sha256="", validation_loss=loss)


def test_the_rule_keeps_the_newest_the_regular_and_the_best() -> None:
    found = [about(100, 3.0), about(200, 1.0), about(300, 2.0), about(400), about(500, 5.0)]
    assert Rule(num_newest=2).keeps(found) == {400, 500}
    assert Rule(num_newest=9).keeps(found) == {100, 200, 300, 400, 500}
    assert Rule(num_newest=1, every_images=200).keeps(found) == {200, 400, 500}
    assert Rule(num_newest=1, best=True).keeps(found) == {200, 500}
    assert Rule(num_newest=1, best=True).keeps([about(100)]) == {100}


def test_a_copy_is_apart_from_what_is_trained_on() -> None:
    weight = torch.zeros(3)
    original = {"network": {"w": weight}, "list": [weight, (weight, 1)], "number": 2}
    copy = copied(original)
    weight += 1
    assert copy["network"]["w"].sum() == copy["list"][0].sum() == copy["list"][1][0].sum() == 0
    assert copy["list"][1][1] == 1
    assert copy["number"] == 2


def test_writes_go_on_behind_and_their_errors_are_raised_once() -> None:
    writer, allowed, done = Writer(), threading.Event(), []

    def slow() -> None:
        allowed.wait(20)
        done.append(1)

    writer.submit(slow)
    writer.check()  # not finished, so nothing to see
    assert not done
    allowed.set()
    writer.check(wait=True)
    assert done == [1]

    def fails() -> None:
        raise OSError("no room")

    writer.submit(fails)
    with pytest.raises(OSError, match="no room"):
        writer.submit(slow)
    writer.check(wait=True)
    assert done == [1]


def test_a_full_disk_leaves_the_checkpoints_that_were_there(tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    try:
        store = Store(str(disk / "checkpoints"))
        store.write(100, state(100))
        with pytest.raises(OSError, match="No space left"):
            store.write(200, {"weights": torch.zeros(100_000)})
        assert numbers(store) == [100]
        assert store.read_newest()["num_images"] == 100
        assert not list(disk.rglob(".*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
