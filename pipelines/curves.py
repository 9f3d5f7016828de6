"""Which chart each key of the log belongs to.

Keys that training is known to write are drawn together, in sections of their own; any other gets a plain curve in the last
section, so nothing that was logged is left out. Called by `report`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipelines.charts import Chart, Line, draw_lines, draw_shares
from pipelines.history import Column, History, shares, thin
from pipelines.markup import Element
from pipelines.style import NUM_COLORS, ordered_colors

_LAYER = re.compile(r"loss/(\d+)")
_NOISE = re.compile(r"loss/(\d+)/logsnr_(-?\d+(?:\.\d+)?)")
_SCORE = re.compile(r"score/([^/]+)/(\d+)")
_MAX_BANDS = 4
"""Lines of a chart that shows how far the values of a bucket lie apart."""
_LATEST = 0.9
"""The loss by noise level is averaged over what was logged after this part of the run, its last tenth."""


@dataclass(frozen=True, slots=True)
class Section:
    """Charts under one heading."""

    title: str
    note: str
    figures: list[Element]


def sections(history: History) -> list[Section]:
    """All that was logged, as charts; no section is without one."""
    drawing = _Drawing(history)
    made = [
        Section("Training", _LOSS_NOTE, list(drawing.training())),
        Section("Validation", _VAL_NOTE, list(drawing.validation())),
        Section("Loss by noise level", _NOISE_NOTE, list(drawing.noise())),
        Section("Speed and memory", "", list(drawing.speed())),
        Section("Other values", "", list(drawing.others())),
    ]
    return [section for section in made if section.figures]


_LOSS_NOTE = "The loss is the squared error of the network's prediction, averaged over all noise levels, without weights."
_VAL_NOTE = (
    "The loss of pictures that are not trained on, beside the same layer's training loss. Scores while training are of few "
    "pictures: compare them along a run, not with an evaluation of more."
)
_NOISE_NOTE = (
    "Pictures are sorted by the logsnr of the reference: low is nearly all noise, where composition is learned, high is nearly "
    "clean, where detail is."
)


class _Drawing:
    """Makes charts, and knows which keys have been in none yet."""

    def __init__(self, history: History) -> None:
        self.columns = history.columns
        self.left = dict.fromkeys(history.columns)
        self.losses_of = self._layers("")
        self.validation_of = self._layers("val/")
        self.scores_of = self._scores()
        found = [self.losses_of, self.validation_of, *self.scores_of.values()]
        layers = sorted({int(layer) for keys in found for layer in keys})
        self.colors = {str(layer): _kind(number) for number, layer in enumerate(layers)}

    def training(self) -> Iterator[Element]:
        """The loss of all layers, gradient norm, learning rate."""
        lines = [
            self._line(key, f"{layer} px", self.colors[layer])
            for layer, key in self.losses_of.items()
        ]
        yield from _draw(
            Chart(title="Loss", unit="of each layer", lines=(*lines,), logarithmic=True)
        )
        yield from self._plain("grad_norm", "Gradient norm", "before clipping", logarithmic=True)
        yield from self._plain("learning_rate", "Learning rate", from_zero=True)

    def validation(self) -> Iterator[Element]:
        """A chart a layer, the noise levels, a chart a score, then other keys of the kind."""
        for layer, key in self.validation_of.items():
            lines = [self._line(key, "validation", self.colors[layer], dashed=True)]
            if layer in self.losses_of:
                lines.insert(0, self._line(self.losses_of[layer], "training", self.colors[layer]))
            title = f"Validation loss at {layer} px"
            yield from _draw(Chart(title=title, unit="", lines=(*lines,), logarithmic=True))
        yield from self._noise_levels("val/", "Validation loss")
        for score, keys in self.scores_of.items():
            lines = [
                self._line(key, f"{layer} px", self.colors[layer]) for layer, key in keys.items()
            ]
            # A distance falls by orders of magnitude.
            chart = Chart(
                title=f"{score} while training",
                unit="of each layer",
                lines=(*lines,),
                logarithmic=score.startswith(("fd", "fid")),
            )
            yield from _draw(chart)
        for key in [key for key in self.left if key.startswith("val/")]:
            yield from self._plain(key, key, logarithmic=True)

    def noise(self) -> Iterator[Element]:
        """A chart of the run's end, and one a layer over the run."""
        yield from self._noise_levels("", "Loss")

    def speed(self) -> Iterator[Element]:
        """Pictures a second, where the time goes, memory."""
        yield from self._plain("images_per_second", "Speed", "pictures a second", from_zero=True)
        yield from self._plain("utilization", "Utilization", "of a matrix product", from_zero=True)
        yield from self._times()
        memory = [key for key in self.left if key.startswith("memory/")]
        for first in range(0, len(memory), NUM_COLORS):
            keys = memory[first : first + NUM_COLORS]
            in_bytes = all(key.endswith("_bytes") for key in keys)
            lines = [
                self._line(key, key.removeprefix("memory/").removesuffix("_bytes"), _kind(number))
                for number, key in enumerate(keys)
            ]
            unit = "bytes" if in_bytes else ""
            yield from _draw(Chart(title="Memory", unit=unit, lines=(*lines,), from_zero=True))

    def others(self) -> Iterator[Element]:
        """Whatever is left."""
        for key in list(self.left):
            yield from self._plain(key, key)

    def _layers(self, prefix: str) -> dict[str, str]:
        """Layer -> key of its loss, low to high."""
        matches = ((_LAYER.fullmatch(_loss_name(key, prefix)), key) for key in self.columns)
        found = {match[1]: key for match, key in matches if match}
        return dict(sorted(found.items(), key=lambda item: int(item[0])))

    def _scores(self) -> dict[str, dict[str, str]]:
        """Score -> layer, low to high -> key."""
        found: dict[str, dict[str, str]] = {}
        for key in self.columns:
            if match := _SCORE.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = key
        return {
            score: dict(sorted(keys.items(), key=lambda item: int(item[0])))
            for score, keys in found.items()
        }

    def _noise_levels(self, prefix: str, title: str) -> Iterator[Element]:
        layers: dict[str, dict[float, str]] = {}
        for key in self.columns:
            if match := _NOISE.fullmatch(_loss_name(key, prefix)):
                layers.setdefault(match[1], {})[float(match[2])] = key
        layers = {layer: dict(sorted(layers[layer].items())) for layer in sorted(layers, key=int)}
        yield from _draw(self._profile(layers, title))
        for layer, keys in layers.items():
            colors = ordered_colors(len(keys))
            lines = [
                self._line(key, f"{middle:g}".replace("-", "\N{MINUS SIGN}"), color)
                for color, (middle, key) in zip(colors, keys.items(), strict=True)
            ]
            heading = f"{title} at {layer} px"
            yield from _draw(
                Chart(title=heading, unit="by logsnr", lines=(*lines,), logarithmic=True)
            )

    def _profile(self, layers: Mapping[str, Mapping[float, str]], title: str) -> Chart:
        """Loss over logsnr, at the end."""
        end = max((column.x[-1] for column in self.columns.values()), default=0.0)
        lines = [
            Line(
                name=f"{layer} px",
                x=np.array([*keys]),
                y=np.array([_latest(self.columns[key], end) for key in keys.values()]),
                color=self.colors.get(layer, _kind(number)),
            )
            for number, (layer, keys) in enumerate(layers.items())
        ]
        return Chart(
            title=f"{title} by noise level",
            unit="at the end of the log",
            lines=(*lines,),
            logarithmic=True,
            x_title="logsnr of the reference",
            x_from_zero=False,
        )

    def _times(self) -> Iterator[Element]:
        keys = [key for key in self.left if key.startswith("time/")]
        columns = shares([self.columns[key] for key in keys])
        if not columns or not columns[0].x:
            return
        means = [float(np.mean(column.y)) for column in columns]
        lines = []
        for number, index in enumerate(np.argsort(means)[::-1].tolist()):
            del self.left[keys[index]]
            curve = thin(columns[index])
            share = f"{100 * means[index]:.1f}" if means[index] >= 0.0005 else "< 0.1"
            name = f"{keys[index].removeprefix('time/')} {share} %"
            lines.append(Line(name=name, x=curve.x, y=100 * curve.y, color=_kind(number)))
        yield draw_shares("Where the time goes", "% of each step", lines)

    def _plain(
        self,
        key: str,
        title: str,
        unit: str = "",
        *,
        logarithmic: bool = False,
        from_zero: bool = False,
    ) -> Iterator[Element]:
        """A chart of one key, if it was logged."""
        if key in self.columns:
            yield from _draw(
                Chart(
                    title=title,
                    unit=unit,
                    lines=(self._line(key, "", _kind(0)),),
                    logarithmic=logarithmic,
                    from_zero=from_zero,
                )
            )

    def _line(self, key: str, name: str, color: str, *, dashed: bool = False) -> Line:
        self.left.pop(key, None)
        curve = thin(self.columns[key])
        thinned = len(curve.x) < len(self.columns[key].x)
        return Line(
            name=name,
            x=curve.x,
            y=curve.y,
            low=curve.low if thinned else None,
            high=curve.high if thinned else None,
            broken=curve.broken,
            color=color,
            dashed=dashed,
        )


def _draw(chart: Chart) -> Iterator[Element]:
    """A figure, if the chart has a line; bands only where they do not lie over each other."""
    if len(chart.lines) > _MAX_BANDS:
        lines = tuple(replace(line, low=None, high=None) for line in chart.lines)
        chart = replace(chart, lines=lines)
    if chart.lines:
        yield draw_lines(chart)


def _loss_name(key: str, prefix: str) -> str:
    """A key under a prefix as training names it; ``val/32`` is ``val/loss/32``."""
    if not key.startswith(prefix):
        return ""
    name = key.removeprefix(prefix)
    return f"loss/{name}" if prefix and name[:1].isdigit() else name


def _latest(column: Column, end: float) -> float:
    """Mean of the finite values in the last part of the run, or the last of them; NaN if there is none."""
    x, y = np.asarray(column.x), np.asarray(column.y)
    finite = np.isfinite(y)
    latest = y[finite & (x > _LATEST * end)]
    latest = latest if len(latest) else y[finite][-1:]
    return float(latest.mean()) if len(latest) else math.nan


def _kind(number: int) -> str:
    return f"kind-{number % NUM_COLORS}"
