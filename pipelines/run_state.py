"""What there is of a run, finished or not, read from its directory alone: its log, its configuration, what was exported.

Only the log must be there; what is damaged counts as missing or is named. Called by `report` and `status`.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pipelines import storage
from pipelines.errors import UserError
from pipelines.history import History, parse
from pipelines.schema import RunDir

CONFIG_OF_MODEL = "config.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What was found in a run's directory."""

    layout: RunDir
    history: History
    config_text: str | None
    config: Mapping[str, Any]
    "The same, read; empty if it is not there or cannot be read."
    logged: datetime.datetime | None
    "When the last line was written; None where there is no log."
    num_exported: int
    "Pictures that the exported model was trained on; 0 if there is none."

    @property
    def num_seen(self) -> int:
        """Pictures, by the last line of the log."""
        return int(self.history.positions[-1]) if self.history.positions else 0

    @property
    def num_planned(self) -> int | None:
        """Pictures of the whole training."""
        train = self.config.get("train")
        planned = train.get("num_images") if isinstance(train, Mapping) else None
        return planned if isinstance(planned, int) else None

    @property
    def finished(self) -> bool:
        """Whether there is a model of the whole training."""
        return self.num_exported >= (self.num_planned or 1)

    @property
    def resolutions(self) -> list[int] | None:
        """Pixels of a side, lowest first, where the configuration tells."""
        model = self.config.get("model")
        found = model.get("resolutions") if isinstance(model, Mapping) else None
        return found if isinstance(found, list) else None

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.layout.path.rpartition("/")[2]


def find(path: str) -> Run | None:
    """Reads a run's directory; None where there is neither a configuration nor a log.

    Raises:
        UserError: there is a log that cannot be read.
    """
    layout = RunDir(storage.absolute(path))
    config_text = text_of(layout.config)
    log, logged = b"", None
    try:
        log = storage.read_bytes(layout.metrics_log)
        logged = storage.modified(layout.metrics_log)
    except (FileNotFoundError, NotADirectoryError):
        if config_text is None:
            return None
    except OSError as error:
        raise UserError(f"{layout.metrics_log} cannot be read: {error}") from error
    try:
        config = yaml.safe_load(config_text or "")
    except yaml.YAMLError:
        config = None
    return Run(
        layout=layout,
        history=parse(log.decode(errors="replace")),
        config_text=config_text,
        config=config if isinstance(config, Mapping) else {},
        logged=logged,
        num_exported=_num_exported(layout),
    )


def load(path: str) -> Run:
    """Reads a run that has logged something.

    Raises:
        UserError: there is no run, or it has logged nothing yet.
    """
    found = find(path)
    if found is None:
        raise UserError(
            f"run={path!r}: no run there; `layered train --preset NAME --run {path}` makes one"
        )
    if not found.history.positions:
        raise UserError(
            f"run={path!r}: nothing is logged yet; `layered train --run {path}` writes metrics.jsonl, a line "
            "every train.log_every_images pictures"
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """How long training took, by the speeds that were logged."""

    seconds: float
    "So far."
    speed: float
    "Pictures a second, on average."
    latest_speed: float
    seconds_left: float | None
    "At the latest speed; None where nothing is left, or nobody knows how much."
    pause: float
    "Seconds between two of the latest lines of the log, as a rule."


LATEST_LINES = 20
"""Of which the usual pause is taken."""


def times(found: Run) -> Times | None:
    """How long it took and, of a run that is not finished, will take; None where no speed is logged."""
    column = found.history.columns.get("images_per_second")
    if column is None:
        return None
    speed = np.asarray(column.y)
    pictures = np.diff(np.asarray(column.x), prepend=0.0)
    sound = np.isfinite(speed) & (speed > 0)
    if not sound.any():
        return None
    seconds = pictures[sound] / speed[sound]
    latest = float(speed[sound][-1])
    left = (found.num_planned or 0) - found.num_seen
    return Times(
        seconds=float(seconds.sum()),
        speed=float(pictures[sound].sum() / seconds.sum()),
        latest_speed=latest,
        seconds_left=left / latest if left > 0 else None,
        pause=float(np.median(seconds[-LATEST_LINES:])),
    )


def _num_exported(layout: RunDir) -> int:
    tree = tree_of(storage.join(layout.model, CONFIG_OF_MODEL))
    trained = tree.get("num_images_trained") if isinstance(tree, Mapping) else None
    return trained if isinstance(trained, int) else 0


def text_of(path: str) -> str | None:
    """The text of a file; None if there is none."""
    try:
        return storage.read_bytes(path).decode(errors="replace")
    except OSError:
        return None


def tree_of(path: str) -> Any:
    """What a JSON file holds; None if there is none, and a sentence where it cannot be read."""
    text = text_of(path)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        return f"{path.rpartition('/')[2]} cannot be read: {error}"


def duration(seconds: float) -> str:
    """Seconds in the two greatest units: ``3 h 20 min``."""
    sizes = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    rest = round(seconds)
    parts: list[str] = []
    for unit, size in sizes.items():
        number, rest = divmod(rest, size)
        if number or (parts and len(parts) < 2):
            parts.append(f"{number:,} {unit}")
    return " ".join(parts[:2]) or "under 1 s"
