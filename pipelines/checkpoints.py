"""Checkpoints of a training run: there whole or not at all, checked when they are read, kept by a rule.

    RUN/checkpoints/000000250000/state.pt      all that training goes on from
                                 about.json    its size and SHA-256, pictures seen, validation loss; written last

A directory without ``about.json`` is what an interrupted write left; it counts for nothing and is removed with the next write.
`Store` reads, writes and removes; `Writer` writes behind the training, from a copy of the state. Called by `trainer`, on rank 0
alone except for reading, and by `train` and `export`.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines import storage
from pipelines.schema import RunDir
from pipelines.session import warning

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
ABOUT_FILE = "about.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """``about.json`` of a checkpoint."""

    num_images: int
    "Pictures seen."
    bytes: int
    "Of the state's file."
    sha256: str
    "Of the state's file."
    validation_loss: float | None
    "When it was written, if it had been measured by then; what the best checkpoint is the best by."


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Which checkpoints are kept."""

    num_newest: int
    every_images: int | None = None
    "Those at multiples of this too."
    best: bool = False
    "The one with the lowest validation loss too."

    def keeps(self, found: list[About]) -> set[int]:
        """Pictures seen by those that stay."""
        counts = sorted(about.num_images for about in found)
        kept = set(counts[-self.num_newest :])
        if self.every_images is not None:
            kept |= {count for count in counts if count % self.every_images == 0}
        scored = [
            (about.validation_loss, about.num_images)
            for about in found
            if about.validation_loss is not None
        ]
        if self.best and scored:
            kept.add(min(scored)[1])
        return kept


class Store:
    """The checkpoints of a run.

    Args:
        directory: absolute; local or ``s3://``.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def path(self, num_images: int) -> str:
        """Directory of a checkpoint."""
        return storage.join(self.directory, f"{num_images:012d}")

    def all(self) -> list[About]:
        """Those that were written to their end, oldest first; whether they are sound shows when they are read."""
        return [about for name in self._names() if (about := self._about(name)) is not None]

    def write(self, num_images: int, state: Mapping[str, Any], loss: float | None = None) -> None:
        """Writes a checkpoint; of the same number of pictures it takes the other's place.

        Args:
            num_images: pictures seen.
            state: for `torch.load` with ``weights_only``.
            loss: the validation loss.

        Raises:
            OSError: it could not be written; then it is not there, and the others are.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getbuffer()
        about = About(
            num_images=num_images,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            validation_loss=loss,
        )
        path = self.path(num_images)
        storage.remove(storage.join(path, ABOUT_FILE))
        storage.write_atomically(storage.join(path, STATE_FILE), content)
        text = json.dumps(asdict(about), indent=1) + "\n"
        storage.write_atomically(storage.join(path, ABOUT_FILE), text.encode())

    def prune(self, rule: Rule) -> None:
        """Removes what the rule does not keep, and what interrupted writes left."""
        found = {f"{about.num_images:012d}": about for about in self.all()}
        kept = rule.keeps(list(found.values()))
        for name in self._names():
            if name not in found or found[name].num_images not in kept:
                # What makes it one goes first, so that it is never half of one.
                storage.remove(storage.join(self.directory, name, ABOUT_FILE))
                storage.remove_directory(storage.join(self.directory, name))

    def read_newest(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The state of the newest checkpoint that is sound; of one that is not a warning tells. None where there is none."""
        for about in reversed(self.all()):
            try:
                return self.read(about.num_images, device)
            except (OSError, ValueError) as error:
                warning(
                    logger,
                    "damaged_checkpoint",
                    checkpoint=self.path(about.num_images),
                    error=error,
                    next="the one before it is tried",
                )
        return None

    def read(self, num_images: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state of a checkpoint.

        Raises:
            OSError: it cannot be read.
            ValueError: its bytes are not those that were written, or there is none.
        """
        about = self._about(f"{num_images:012d}")
        if about is None:
            raise ValueError(f"{self.path(num_images)} holds no checkpoint")
        content = storage.read_bytes(storage.join(self.path(about.num_images), STATE_FILE))
        if len(content) != about.bytes or hashlib.sha256(content).hexdigest() != about.sha256:
            raise ValueError(
                f"{STATE_FILE} has {len(content):,} bytes that are not the {about.bytes:,} written"
            )
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location=device, weights_only=True
        )
        return state

    def _names(self) -> list[str]:
        return [name for name in storage.list_directory(self.directory) if name.isdigit()]

    def _about(self, name: str) -> About | None:
        try:
            text = storage.read_bytes(storage.join(self.directory, name, ABOUT_FILE))
            return About(**json.loads(text))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def newest(layout: RunDir) -> str:
    """Says where a run that was stopped can go on from."""
    store = Store(layout.checkpoints)
    found = store.all()
    if not found:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {store.path(found[-1].num_images)}"


class Writer:
    """Does writes in a thread of its own, one at a time, in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begins a write, when the one before has ended.

        Raises:
            Exception: what the write before raised.
        """
        self.check(wait=True)
        self._pending = self._thread.submit(write)

    def check(self, *, wait: bool = False) -> None:
        """Looks at the write that was begun last, if it has ended.

        Args:
            wait: for its end.

        Raises:
            Exception: what it raised; once.
        """
        if self._pending is not None and (wait or self._pending.done()):
            pending, self._pending = self._pending, None
            pending.result()


def copied(state: Any) -> Any:
    """The state on the CPU, apart from what training goes on to change."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
