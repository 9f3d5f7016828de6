"""A sweep over guidance and steps, as tables and as charts: Frechet distance against CLIP score, or else Inception-style score.

One chart a resolution. Along a curve guidance changes, and every number of steps has a curve of its own; where guidance is one
and the same, the steps change. Down is better; so is right. Called by `score_report`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.charts import Chart, Line
from pipelines.markup import cell
from pipelines.score_tables import (
    TRAINED,
    Named,
    Score,
    Table,
    Tree,
    direction,
    finite,
    first,
    is_distance,
    is_inception_score,
    label,
    mapping,
    read_scores,
    size_label,
)
from pipelines.style import ordered_colors

_CLIP_SCORE = "clip_score"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a sweep."""

    guidance: float
    num_steps: float
    scores: dict[str, Named]
    "By resolution."


@dataclass(frozen=True, slots=True)
class Sweep:
    """All settings, by steps and guidance."""

    settings: tuple[Setting, ...]
    distance: str | None
    "Name of the Frechet distance."
    others: tuple[str, ...]
    "Names of what it is held against, the first in charts."

    @property
    def sizes(self) -> list[str]:
        """Resolutions of any setting."""
        return list(dict.fromkeys(size for setting in self.settings for size in setting.scores))


def read(result: Mapping[str, Any]) -> Sweep | None:
    """The sweep of a result; None where there is none that can be shown."""
    found = result.get("sweep")
    settings = [_setting(each) for each in found] if isinstance(found, list) else []
    known = [setting for setting in settings if setting is not None]
    if not known:
        return None
    known.sort(key=lambda setting: (setting.num_steps, setting.guidance))
    trees: list[Tree] = [{TRAINED: setting.scores} for setting in known]

    def name_of(rule: Callable[[str], bool]) -> str | None:
        return next(filter(None, (first(tree, rule) for tree in trees)), None)

    others = (name_of(lambda name: name.startswith(_CLIP_SCORE)), name_of(is_inception_score))
    return Sweep(tuple(known), name_of(is_distance), tuple(filter(None, others)))


def _setting(tree: object) -> Setting | None:
    if not isinstance(tree, Mapping):
        return None
    guidance, steps = finite(tree.get("guidance")), finite(tree.get("num_steps"))
    scores = read_scores(mapping(tree, "scores")).get(TRAINED)
    if guidance is None or steps is None or scores is None:
        return None
    return Setting(guidance, steps, scores)


def tables(sweep: Sweep, shown: Callable[[Score | None], str]) -> list[tuple[str, Table]]:
    """A table a resolution, with its title: guidance, steps, scores."""
    names = [*([sweep.distance] if sweep.distance else []), *sweep.others]
    head = ("guidance", "steps", *map(label, names))
    made = []
    for size in sweep.sizes:
        rows = [
            (
                cell(setting.guidance),
                cell(setting.num_steps),
                *(shown(setting.scores.get(size, {}).get(name)) for name in names),
            )
            for setting in sweep.settings
        ]
        made.append((f"At {size_label(size)}", Table(head, rows)))
    return made


def lowest(sweep: Sweep) -> str:
    """Which setting has the lowest distance at each resolution, as a sentence; empty where none has any."""
    told = []
    for size in sweep.sizes:
        known = [
            (score.value, setting)
            for setting in sweep.settings
            if sweep.distance and (score := setting.scores.get(size, {}).get(sweep.distance))
        ]
        if known:
            value, setting = min(known, key=lambda pair: pair[0])
            guidance, steps = cell(setting.guidance), cell(setting.num_steps)
            told.append(f"{cell(value)} at {size_label(size)} (guidance {guidance}, {steps} steps)")
    return f"Lowest {label(sweep.distance or '')} of the sweep: {', '.join(told)}." if told else ""


def charts(sweep: Sweep) -> list[Chart]:
    """A chart a resolution; without a second score the distance is drawn over guidance or steps."""
    if sweep.distance is None:
        return []
    across = sweep.others[0] if sweep.others else None
    made = []
    for size in sweep.sizes:
        lines = _lines(sweep, size, sweep.distance, across)
        if not lines:
            continue
        along = "guidance" if _along_guidance(sweep) else "steps"
        unit, x_title = direction(sweep.distance), along
        if across is not None:
            unit += f"; numbers are {along}"
            x_title = f"{label(across)}, {direction(across)}"
        made.append(
            Chart(
                title=f"{label(sweep.distance)} at {size_label(size)}",
                unit=unit,
                lines=tuple(lines),
                x_title=x_title,
                x_from_zero=False,
            )
        )
    return made


def _along_guidance(sweep: Sweep) -> bool:
    """Whether guidance changes along a curve, and not the steps."""
    guidances = {setting.guidance for setting in sweep.settings}
    return len(guidances) > 1 or len({setting.num_steps for setting in sweep.settings}) == 1


def _lines(sweep: Sweep, size: str, distance: str, across: str | None) -> list[Line]:
    """Curves whose points have both scores."""
    by_guidance = _along_guidance(sweep)
    curves: dict[float, list[tuple[float, Score, Score]]] = {}
    for setting in sweep.settings:
        steps, guidance = setting.num_steps, setting.guidance
        curve, place = (steps, guidance) if by_guidance else (guidance, steps)
        scores = setting.scores.get(size, {})
        y = scores.get(distance)
        x = Score(place) if across is None else scores.get(across)
        if x is not None and y is not None:
            curves.setdefault(curve, []).append((place, x, y))
    colors = ordered_colors(len(curves))
    lines = []
    for number, (curve, points) in enumerate(sorted(curves.items())):
        places, xs, ys = zip(*points, strict=True)
        (x_low, x_high), (low, high) = _ends(xs), _ends(ys)
        lines.append(
            Line(
                name=f"{cell(curve)} steps" if by_guidance else f"guidance {cell(curve)}",
                x=np.array([score.value for score in xs]),
                y=np.array([score.value for score in ys]),
                x_low=x_low,
                x_high=x_high,
                low=low,
                high=high,
                points=tuple("" if across is None else cell(place) for place in places),
                color=colors[number],
                dashed=number % 2 == 1,
            )
        )
    return lines


def _ends(scores: tuple[Score, ...]) -> np.ndarray:
    """Lower and upper ends of the intervals; NaN where there is none."""
    return np.array([score.interval or (math.nan, math.nan) for score in scores]).T
