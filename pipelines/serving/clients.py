"""Who may draw, and how much: API keys, requests a minute, requests at once.

A key is looked for among all, each compared in constant time, so that the time of a refusal tells nothing about them. Keys are
kept as hashes, under names; the names, never the keys, are what is counted and logged by. Without keys clients are told apart by
address. Knows no HTTP. Called by `guard`.
"""

import contextlib
import hashlib
import hmac
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines import storage
from pipelines.errors import UserError
from pipelines.sections import ServeConfig

KEYS_VARIABLE = "LAYERED_API_KEYS"
"""Environment variable with keys, in the form of a file of keys; also with commas between them."""

MIN_KEY_CHARACTERS = 16
WINDOW_SECONDS = 60.0


class TooMany(RuntimeError):
    """A client has asked for more than it may; it may come again after `retry_after_seconds`."""

    def __init__(self, code: str, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.code, self.retry_after_seconds = code, retry_after_seconds


@dataclass(frozen=True, slots=True)
class Keys:
    """API keys by the names of those who have them."""

    hashes: dict[str, bytes]

    def owner(self, key: str) -> str | None:
        """The name of who has this key; None if nobody has."""
        given = _digest(key)
        found = None
        for name, digest in self.hashes.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def load_keys(settings: ServeConfig) -> Keys:
    """Keys of `serve.keys_file` and of the environment.

    Raises:
        UserError: the file is missing or is none of keys; or keys are required, and there are none. Never shows a key.
    """
    keys: dict[str, bytes] = {}
    if settings.keys_file is not None:
        path = storage.absolute(settings.keys_file)
        try:
            text = storage.read_bytes(path).decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"serve.keys_file={settings.keys_file!r}: {reason}") from error
        keys |= _parse(text.splitlines(), f"serve.keys_file={settings.keys_file!r}")
    keys |= _parse(re.split(r"[,\n]", os.environ.get(KEYS_VARIABLE, "")), KEYS_VARIABLE)
    if settings.require_key and not keys:
        raise UserError(
            "serve.require_key=true needs keys: name a file in serve.keys_file, or set "
            f"{KEYS_VARIABLE}='name: key'"
        )
    return Keys(keys)


def _parse(lines: list[str], source: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in text.partition(":"))
        if not (colon and name and re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARACTERS},}}", key)):
            raise UserError(
                f"{source}, line {number}: must be `name: key`, the key of at least "
                f"{MIN_KEY_CHARACTERS} visible ASCII characters"
            )
        if name in keys:
            raise UserError(f"{source}, line {number}: {name!r} has a key already")
        keys[name] = _digest(key)
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Clients:
    """What each client does and has done in the last minute. For one thread.

    Args:
        settings: Whose limits hold.
        clock: Seconds, never going back.
    """

    def __init__(self, settings: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._times: dict[str, deque[float]] = {}
        self._busy: Counter[str] = Counter()

    @contextlib.contextmanager
    def admitted(self, client: str) -> Iterator[None]:
        """One request of a client, for as long as it is being answered.

        Raises:
            TooMany: it has more at once, or has made more in a minute, than it may.
        """
        most = self._settings.max_concurrent
        if self._busy[client] >= most:
            raise TooMany(
                "too_many_concurrent", f"{most} requests of yours are being answered already", 1.0
            )
        self._count(client)
        self._busy[client] += 1
        try:
            yield
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]

    def _count(self, client: str) -> None:
        now, most = self._clock(), self._settings.requests_per_minute
        times = self._times.pop(client, deque())
        self._times[client] = times  # at the end
        while times and times[0] <= now - WINDOW_SECONDS:
            times.popleft()
        if len(times) >= most:
            raise TooMany(
                "rate_limit_exceeded",
                f"{most} requests a minute are the limit",
                times[0] + WINDOW_SECONDS - now,
            )
        times.append(now)
        self._forget(now)

    def _forget(self, now: float) -> None:
        """Drops who has not come for a minute; who came longest ago stands first."""
        while self._times[name := next(iter(self._times))][-1] <= now - WINDOW_SECONDS:
            del self._times[name]
