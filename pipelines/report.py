"""``layered report``: one page about a run, finished or not, that needs no other file, no network and no script.

Reads what training and evaluation left in the run's directory, and starts no Ray. Only the log must be there; whatever else is
missing is left out, and what is damaged is named.
"""

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pipelines import curves, score_report, storage
from pipelines.errors import UserError
from pipelines.gallery import evenly, figure
from pipelines.history import MAX_POINTS, History, parse
from pipelines.markup import (
    Element,
    cell,
    details,
    element,
    flatten,
    grid,
    links,
    note,
    page,
    section,
    table,
)
from pipelines.schema import RunDir
from pipelines.style import page_style

MAX_GRIDS = 8
"""Of those drawn while training, that are shown."""
GRID_WIDTH = 900
"""Pixels that a grid of training is shrunk to."""

_CONFIG_OF_MODEL = "config.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What was found in a run's directory."""

    layout: RunDir
    history: History
    config_text: str | None
    config: Mapping[str, Any]
    "The same, read; empty if it is not there or cannot be read."
    logged: datetime.datetime
    "When the last line was written."
    num_exported: int
    "Pictures that the exported model was trained on; 0 if there is none."

    @property
    def num_seen(self) -> int:
        """Pictures, by the last line of the log."""
        return int(self.history.positions[-1])

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
    def name(self) -> str:
        """The last part of its path."""
        return self.layout.path.rpartition("/")[2]


def run(path: str, output: str | None = None) -> str:
    """Writes the page.

    Args:
        path: of the run's directory.
        output: where the page goes; ``report.html`` in the run's directory where absent.

    Returns:
        Where it went.

    Raises:
        UserError: there is no run, it has logged nothing yet, or the page cannot be written.
    """
    found = load(path)
    target = storage.absolute(output) if output is not None else found.layout.report
    try:
        storage.write_atomically(target, render(found))
    except OSError as error:
        raise UserError(f"the report cannot be written to {target!r}: {error}") from error
    return target


def load(path: str) -> Run:
    """Reads a run's directory.

    Raises:
        UserError: there is no run, or it has logged nothing yet.
    """
    layout = RunDir(storage.absolute(path))
    config_text = _text(layout.config)
    try:
        log = storage.read_bytes(layout.metrics_log)
        logged = storage.modified(layout.metrics_log)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(_nothing(path, config_text)) from error
    except OSError as error:
        raise UserError(f"{layout.metrics_log} cannot be read: {error}") from error
    history = parse(log.decode(errors="replace"))
    if not history.positions:
        raise UserError(_nothing(path, config_text))
    try:
        config = yaml.safe_load(config_text or "")
    except yaml.YAMLError:
        config = None
    return Run(
        layout=layout,
        history=history,
        config_text=config_text,
        config=config if isinstance(config, Mapping) else {},
        logged=logged,
        num_exported=_num_exported(layout),
    )


def _nothing(path: str, config_text: str | None) -> str:
    if config_text is None:
        return f"run={path!r}: no run there; `layered train --preset NAME --run {path}` makes one"
    return (
        f"run={path!r}: nothing is logged yet; `layered train --run {path}` writes metrics.jsonl, a line every "
        "train.log_every_images pictures"
    )


def _num_exported(layout: RunDir) -> int:
    tree = _tree(storage.join(layout.model, _CONFIG_OF_MODEL))
    trained = tree.get("num_images_trained") if isinstance(tree, Mapping) else None
    return trained if isinstance(trained, int) else 0


def _text(path: str) -> str | None:
    """The text of a file; None if there is none."""
    try:
        return storage.read_bytes(path).decode(errors="replace")
    except OSError:
        return None


def _tree(path: str) -> Any:
    """What a JSON file holds; None if there is none, and a sentence where it cannot be read."""
    text = _text(path)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        return f"{path.rpartition('/')[2]} cannot be read: {error}"


def render(found: Run) -> bytes:
    """The page."""
    parts = [
        *(
            section(part.title, note(part.note), grid(part.figures))
            for part in curves.sections(found.history)
        ),
        *_pictures(found.layout),
        *_scores(found.layout),
        section("All values", *_values(found.history)),
        *_environment(found.layout),
        *_configuration(found),
    ]
    order = {title: place for place, title in enumerate(_ORDER)}
    parts.sort(key=lambda part: order.get(part[0].text or "", len(order)))
    made = datetime.datetime.now(datetime.UTC)
    footer = element("footer", f"Made by layered report, {made:%Y-%m-%d %H:%M} UTC.")
    return page(
        f"{found.name}: layered report",
        page_style(),
        _header(found),
        links(parts),
        element("main", *parts),
        footer,
    )


_ORDER = ("Training", "Validation", "Pictures while training", *score_report.TITLES)
"""Sections that come first."""


def _header(found: Run) -> Element:
    """What one looks for first."""
    state = "finished" if found.finished else "not finished"
    title = element("h1", found.name, " ", element("span", state, class_=f"state {state[:3]}"))
    facts = [
        element("div", element("dt", name), element("dd", *values))
        for name, *values in _facts(found)
    ]
    return element("header", title, element("dl", *facts))


def _facts(found: Run) -> Iterator[tuple[str, *tuple[str | Element, ...]]]:
    yield "run", element("code", found.layout.path)
    if "preset" in found.config:
        yield "preset", str(found.config["preset"])
    planned, seen = found.num_planned, found.num_seen
    if planned is None:
        yield "pictures seen", f"{seen:,}"
    else:
        bar = element("progress", max=planned, value=min(seen, planned), aria_label="pictures seen")
        yield "pictures seen", f"{seen:,} of {planned:,} ", bar
    model = found.config.get("model")
    if isinstance(model, Mapping):
        if isinstance(sizes := model.get("resolutions"), list):
            yield "resolutions", ", ".join(map(str, sizes)) + " px"
        if (count := num_parameters(model)) is not None:
            yield "parameters", f"{count:,}"
    yield from _times(found)
    yield "last line of the log", f"{found.logged:%Y-%m-%d %H:%M} UTC"
    if number := found.history.num_unreadable:
        yield "lines of the log", f"{number:,} cannot be read and are left out"


def _times(found: Run) -> Iterator[tuple[str, str]]:
    """How long it took and, of a run that is not finished, will take."""
    column = found.history.columns.get("images_per_second")
    if column is None:
        return
    speed = np.asarray(column.y)
    pictures = np.diff(np.asarray(column.x), prepend=0.0)
    sound = np.isfinite(speed) & (speed > 0)
    seconds = float(np.sum(pictures[sound] / speed[sound]))
    if seconds:
        yield "training time", duration(seconds)
        yield "mean speed", f"{pictures[sound].sum() / seconds:,.3g} pictures a second"
    left = (found.num_planned or 0) - found.num_seen
    if left > 0 and sound.any():
        yield "left at the latest speed", duration(left / float(speed[sound][-1]))


def num_parameters(model: Mapping[str, Any]) -> int | None:
    """Of the network that a configuration describes; None if this version cannot make it."""
    import torch

    from layered_model.shape import UNetConfig
    from layered_model.unet import make_network

    fields: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in model.items()
    }
    try:
        with torch.device("meta"):
            network = make_network(UNetConfig(**fields))
    except (TypeError, ValueError):
        return None
    return sum(parameter.numel() for parameter in network.parameters())


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


def _pictures(layout: RunDir) -> Iterator[Element]:
    """Grids from all over the training."""
    names = [n for n in storage.list_directory(layout.samples) if re.fullmatch(r"\d+\.png", n)]
    names.sort(key=lambda name: int(name.removesuffix(".png")))
    chosen = evenly(names, MAX_GRIDS)
    paths = [storage.join(layout.samples, name) for name in chosen]
    figures = [
        _grid_of(int(name.removesuffix(".png")), content)
        for name, content in zip(chosen, storage.read_each(paths), strict=True)
    ]
    if figures:
        told = "The same captions and noise each time, drawn with averaged weights."
        if len(chosen) < len(names):
            told += f" {len(chosen)} of {len(names)} grids."
        yield section(
            "Pictures while training", note(told), element("div", *figures, class_="pictures")
        )


def _grid_of(num_images: int, content: bytes | OSError) -> Element:
    told = f"after {num_images:,} pictures"
    return figure(content, told, f"Captions and what was drawn for them, {told}", GRID_WIDTH)


def _scores(layout: RunDir) -> Iterator[Element]:
    """What the evaluation left."""
    tree = _tree(layout.scores)
    result = {"warnings": [tree]} if isinstance(tree, str) else tree
    if not isinstance(result, Mapping):
        result = {}
    sheets = score_report.read_sheets(layout)
    yield from score_report.elements(score_report.sections(result, sheets))


def _values(history: History) -> Iterator[Element]:
    """Every key of the log in numbers."""
    rows: list[tuple[str, ...]] = []
    for key, column in history.columns.items():
        y = np.asarray(column.y)
        seen = y[np.isfinite(y)]
        extremes = (seen.min(), seen.max()) if len(seen) else (math.nan, math.nan)
        numbers = (y[0], y[-1], *extremes)
        rows.append((key, f"{len(y):,}", *map(cell, numbers), f"{len(y) - len(seen):,}"))
    head = ("key", "lines", "first", "last", "least", "greatest", "not finite")
    yield note(
        f"Lines of the log: {len(history.positions):,}. Of more than {MAX_POINTS} a chart shows means of equally many, and "
        "with up to four curves a shade from the least to the greatest. Crosses at the top mark values that are not finite."
    )
    yield details("Table", table(head, rows))
    if history.texts:
        yield details("Not numbers, the last of each", table((), history.texts.items(), prose=True))


def _environment(layout: RunDir) -> Iterator[Element]:
    tree = _tree(layout.environment)
    if isinstance(tree, str):
        yield section("Environment", element("p", tree, class_="bad"))
    elif tree:
        yield section(
            "Environment", details("What training ran on", table((), flatten(tree), prose=True))
        )


def _configuration(found: Run) -> Iterator[Element]:
    if found.config_text is not None:
        text = element("pre", found.config_text)
        yield section("Configuration", details("config.yaml", text))
