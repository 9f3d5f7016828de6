"""Pictures that lie ready for a while."""

from pipelines.serving import shelf as module
from pipelines.serving.shelf import Shelf


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_file_lies_there_for_its_time():
    clock = Clock()
    shelf = Shelf(10.0, clock)
    first = shelf.put(b"one", "image/png", "png")
    clock.now = 5.0
    second = shelf.put(b"two", "image/webp", "webp")
    assert shelf.get(first)[:2] == (b"one", "image/png")
    clock.now = 10.0
    assert shelf.get(first) is None
    assert shelf.get(second)[:2] == (b"two", "image/webp")
    assert shelf.get("other") is None
    assert first != second
    assert (first[-4:], second[-5:]) == (".png", ".webp")
    assert len(first) > 30


def test_the_oldest_make_room(monkeypatch):
    monkeypatch.setattr(module, "MAX_SHELF_BYTES", 100)
    shelf = Shelf(10.0)
    names = [shelf.put(b"x" * 40, "image/png", "png") for _ in range(4)]
    assert [shelf.get(name) is not None for name in names] == [False, False, True, True]
    large = shelf.put(b"x" * 200, "image/png", "png")
    assert shelf.get(large) is None  # more than there is room for
    assert shelf._num_bytes == 0
