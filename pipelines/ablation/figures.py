"""Charts of an experiment: every seed of every cell, and curves of the first metric across what it costs. Called by `story`."""

import numpy as np

from pipelines.ablation.dots import Dots
from pipelines.ablation.experiment import WAYS
from pipelines.ablation.findings import Findings
from pipelines.ablation.grid import label
from pipelines.charts import Chart, Line
from pipelines.score_tables import size_label
from pipelines.style import ordered_colors

_ACROSS = {
    "draw_seconds": "seconds of drawing a picture",
    "drawing_macs": "billion multiply-adds of drawing a picture",
}
"""What can lie across a chart of curves."""


def judged(found: Findings) -> list[Dots]:
    """Of the first metric, a chart for each baseline and resolution, the highest first."""
    experiment = found.grid.experiment
    primary = next(iter(experiment.metrics))
    name, unit = found.name(primary), WAYS[experiment.direction(primary)]
    made = []
    for baseline, members in found.groups.items():
        for key in reversed([key for key in found.values if key[0] == primary]):
            cells = {
                cell: list(found.values[key].get(cell, {}).values())
                for cell in members
                if found.values[key].get(cell)
            }
            title = f"{name} at {size_label(key[1])}" if key[1] else name
            if cells:
                made.append(Dots(title=title, unit=unit, cells=cells, baseline=baseline))
    return made


def curves(found: Findings) -> list[Chart]:
    """The first metric against another number of the cells, where the experiment asks for that."""
    experiment = found.grid.experiment
    if not experiment.curve:
        return []
    across, factor = experiment.curve["across"], experiment.curve["factor"]
    primary = next(iter(experiment.metrics))
    levels = {label(each): each[factor] for each in found.grid.combinations}
    names = list(dict.fromkeys(levels.values()))
    colors = ordered_colors(len(names))
    made = []
    for key in reversed([key for key in found.values if key[0] == primary]):
        lines = []
        for number, name in enumerate(names):
            points = sorted(
                (place, list(found.values[key][cell].values()))
                for cell, level in levels.items()
                if level == name and cell in found.values[key]
                if (place := _across(found, across, cell)) is not None
            )
            if points:
                xs, ys = zip(*points, strict=True)
                lines.append(
                    Line(
                        name=name,
                        x=np.array(xs),
                        y=np.array([np.mean(y) for y in ys]),
                        low=np.array([min(y) for y in ys]),
                        high=np.array([max(y) for y in ys]),
                        points=("",) * len(xs),
                        color=colors[number],
                        dashed=number % 2 == 1,
                    )
                )
        if lines:
            unit = WAYS[experiment.direction(primary)]
            title = f"{found.name(primary)} at {size_label(key[1])}"
            made.append(
                Chart(
                    title=title,
                    unit=unit,
                    lines=tuple(lines),
                    x_title=_ACROSS[across],
                    x_from_zero=True,
                )
            )
    return made


def _across(found: Findings, what: str, cell: str) -> float | None:
    if what == "drawing_macs":
        return found.costs[cell].drawing_macs / 1e9
    spread = found.spread((what, ""), cell)
    return None if spread is None else spread.mean
