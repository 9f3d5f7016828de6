"""``layered report``: one page about a run, finished or not, that needs no other file, no network and no script.

Reads what training and evaluation left in the run's directory, and starts no Ray. Only the log must be there; whatever else is
missing is left out, and what is damaged is named.
"""

import datetime
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipelines import curves, pages, score_report, storage
from pipelines.errors import UserError
from pipelines.gallery import evenly, figure
from pipelines.history import MAX_POINTS, History
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
from pipelines.run_state import Run, duration, load, times, tree_of
from pipelines.schema import RunDir
from pipelines.style import page_style

MAX_GRIDS = 8
"""Of those drawn while training, that are shown."""
GRID_WIDTH = 900
"""Pixels that a grid of training is shrunk to."""


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
    if (sizes := found.resolutions) is not None:
        yield "resolutions", ", ".join(map(str, sizes)) + " px"
    model = found.config.get("model")
    if isinstance(model, Mapping) and (count := num_parameters(model)) is not None:
        yield "parameters", f"{count:,}"
    if (spent := times(found)) is not None:
        yield "training time", duration(spent.seconds)
        yield "mean speed", f"{spent.speed:,.3g} pictures a second"
        if spent.seconds_left is not None:
            yield "left at the latest speed", duration(spent.seconds_left)
    if found.logged is not None:
        yield "last line of the log", f"{found.logged:%Y-%m-%d %H:%M} UTC"
    if number := found.history.num_unreadable:
        yield "lines of the log", f"{number:,} cannot be read and are left out"


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
    tree = tree_of(layout.scores)
    result = {"warnings": [tree]} if isinstance(tree, str) else tree
    if not isinstance(result, Mapping):
        result = {}
    sheets = score_report.read_sheets(layout)
    yield from pages.elements(score_report.sections(result, sheets))


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
    tree = tree_of(layout.environment)
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


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["report", *sys.argv[1:]]))
