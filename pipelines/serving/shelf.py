"""Pictures that can be fetched for a while, in memory. Called by `api`."""

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

MAX_SHELF_BYTES = 512 * 2**20
"""Of all pictures; the oldest make room for new ones."""


class File(NamedTuple):
    """A picture that lies here."""

    content: bytes
    media_type: str
    until: float


class Shelf:
    """Files under names that nobody can guess. For one thread.

    Args:
        seconds: How long each lies here.
        clock: Seconds, never going back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._files: dict[str, File] = {}
        self._num_bytes = 0

    def put(self, content: bytes, media_type: str, suffix: str) -> str:
        """Keeps a file; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{suffix}"
        self._num_bytes += len(content)
        self._files[name] = File(content, media_type, self._clock() + self._seconds)
        self._tidy()
        return name

    def get(self, name: str) -> File | None:
        """A file; None where it is not here, or no longer."""
        self._tidy()
        return self._files.get(name)

    def _tidy(self) -> None:
        """All stay equally long, so those that came first go first."""
        now = self._clock()
        while self._files:
            name, file = next(iter(self._files.items()))
            if file.until > now and self._num_bytes <= MAX_SHELF_BYTES:
                return
            del self._files[name]
            self._num_bytes -= len(file.content)
