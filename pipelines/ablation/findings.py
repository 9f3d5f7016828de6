"""What the cells of an experiment came to: their numbers, what those say about differences, and what they cost.

Reads what training and evaluation left in the cells' directories. Pure beyond that; what is missing is missing here too. Called
by `story` and `pipelines.ablate`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from layered_model.diffusion import LayeredDiffusion
from layered_model.sampler import sampling_times
from layered_model.steppers import make_stepper
from pipelines import costs, run_state, storage
from pipelines.ablation import control, pace, paired
from pipelines.ablation.grid import Cell, Grid, label
from pipelines.ablation.paired import Judged, Spread
from pipelines.config import Config
from pipelines.run_state import Run
from pipelines.schema import RunDir
from pipelines.score_tables import (
    TRAINED,
    Score,
    is_distance,
    is_inception_score,
    mapping,
    read_scores,
)

LAST_SHARE = 0.25
"""Of the log, over which a training loss is averaged."""

_RULES: dict[str, Callable[[str], bool]] = {
    "fd": is_distance,
    "is": is_inception_score,
    "kd": lambda name: name.startswith(("kd", "kid")),
}
"""Names of scores by metric; those of the others begin with the metric's."""

Key = tuple[str, str]
"A metric and a resolution as text, which is empty for what has none."

Pair = tuple[str, str]
"A cell, and the baseline that it is compared with."


class Cost(NamedTuple):
    """What a cell took, on average over its seeds."""

    num_images: float
    forward_macs: float
    "Of one pass over one picture."
    training_macs: float
    drawing_macs: float
    "Of one picture."
    training_seconds: float
    "By the clock, beside whatever else the machine did; NaN where the log does not tell."
    memory_bytes: float
    "Most that a worker's process took; of a GPU where there is one."


@dataclass(frozen=True)
class Findings:
    """Numbers of the cells that are finished."""

    grid: Grid
    values: dict[Key, dict[str, dict[int, float]]]
    "Metric and resolution -> cell -> seed -> number."
    names: dict[str, str]
    "Metric -> how the scores call it."
    costs: dict[str, Cost]
    "By cell."

    @property
    def cells(self) -> list[str]:
        """All cells, finished or not."""
        return [label(levels) for levels in self.grid.combinations]

    @cached_property
    def same(self) -> dict[str, str]:
        """Cells that are the same runs as one before them, and that one."""
        first: dict[tuple[str, ...], str] = {}
        found = {}
        for levels in self.grid.combinations:
            runs = tuple(cell.path for cell in self.grid.of(levels))
            if (other := first.setdefault(runs, label(levels))) != label(levels):
                found[label(levels)] = other
        return found

    @cached_property
    def families(self) -> list[tuple[str, list[str]]]:
        """Baselines, each with the cells that differ from it in the same factors; what are the same runs, once."""
        experiment, there = self.grid.experiment, self.grid.combinations
        found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for levels in there:
            if label(levels) in self.same:
                continue
            for other in experiment.compared_with(levels):
                if other in there:
                    differ = tuple(name for name in levels if levels[name] != other[name])
                    found.setdefault((label(other), differ), []).append(label(levels))
        return [(baseline, cells) for (baseline, _), cells in found.items()]

    @property
    def groups(self) -> dict[str, list[str]]:
        """For each baseline the cells that are compared with it, itself before them."""
        found: dict[str, list[str]] = {}
        for baseline, cells in self.families:
            found.setdefault(baseline, [baseline]).extend(cells)
        return found

    @property
    def sizes(self) -> list[str]:
        """Resolutions, low to high."""
        found = {size for _, size in self.values if size}
        return sorted(found, key=int)

    def name(self, metric: str) -> str:
        """What the scores, or people, call a metric."""
        return self.names.get(metric, metric.replace("_", " "))

    def spread(self, key: Key, cell: str) -> Spread | None:
        """Mean and deviation over the seeds; None where there is no number."""
        found = list(self.values.get(key, {}).get(cell, {}).values())
        return Spread.of(found) if found else None

    @cached_property
    def judged(self) -> dict[Key, dict[Pair, Judged]]:
        """Every cell beside its baselines, for each metric and resolution."""
        found: dict[Key, dict[Pair, Judged]] = {}
        for key, numbers in self.values.items():
            for baseline, cells in self.families:
                base, pairs = numbers.get(baseline, {}), {}
                for cell in cells:
                    own = numbers.get(cell, {})
                    seeds = [seed for seed in own if seed in base]
                    if seeds:
                        pairs[cell, baseline] = [own[s] for s in seeds], [base[s] for s in seeds]
                if pairs:
                    direction = self.grid.experiment.direction(key[0])
                    found.setdefault(key, {}).update(paired.judge(pairs, direction))
        return found


def gather(grid: Grid) -> Findings:
    """Reads the numbers of all cells that are finished."""
    wanted = grid.experiment.metrics
    values: dict[Key, dict[str, dict[int, float]]] = {}
    names: dict[str, str] = {}
    spent: dict[str, list[Cost]] = {}
    for cell in grid.cells:
        if not cell.finished:
            continue
        log = run_state.find(cell.training.path)
        for (metric, size), number in {
            **_scores(cell, names),
            **_losses(log),
            **_drawing(cell),
        }.items():
            if metric in wanted:
                values.setdefault((metric, size), {}).setdefault(cell.label, {})[cell.seed] = number
        spent.setdefault(cell.label, []).append(cost_of(cell, log))
    if "control" in wanted:
        for name, seed, size, number in control.shares(grid):
            values.setdefault(("control", size), {}).setdefault(name, {})[seed] = number
    order = {metric: place for place, metric in enumerate(wanted)}
    keys = sorted(values, key=lambda key: (order[key[0]], int(key[1] or 0)))
    means = {
        name: Cost(*(math.fsum(v) / len(v) for v in zip(*many, strict=True)))
        for name, many in spent.items()
    }
    return Findings(grid, {key: values[key] for key in keys}, names, means)


def _scores(cell: Cell, names: dict[str, str]) -> dict[Key, float]:
    """Scores by metric and resolution; notes how they are called."""
    result: dict[str, Any] = json.loads(storage.read_bytes(RunDir(cell.path).scores))
    found = {}
    for size, scores in read_scores(mapping(result, "scores")).get(TRAINED, {}).items():
        for metric in cell_metrics(scores):
            name = metric_name(metric, scores)
            if name is not None:
                names[metric] = name
                found[metric, size] = scores[name].value
    return found


def cell_metrics(scores: Mapping[str, Score]) -> list[str]:
    """Metrics that scores can have."""
    return ["fd", "is", "kd", "precision", "recall", "density", "coverage"] if scores else []


def metric_name(metric: str, scores: Mapping[str, Score]) -> str | None:
    """How the scores call a metric; None where they have none."""
    rule = _RULES.get(metric, lambda name: name == metric or name.startswith(f"{metric}_"))
    return next(filter(rule, scores), None)


def _losses(log: Run | None) -> dict[Key, float]:
    """Losses of the training's log, by layer."""
    found: dict[Key, float] = {}
    if log is None:
        return found
    for key, column in log.history.columns.items():
        kind, _, size = key.rpartition("/")
        numbers = [float(y) for y in column.y if math.isfinite(y)]
        if not size.isdigit() or not numbers:
            continue
        if kind == "val/loss":
            found["val_loss", size] = numbers[-1]
        elif kind == "loss":
            last = numbers[-max(1, round(LAST_SHARE * len(numbers))) :]
            found["train_loss", size] = math.fsum(last) / len(last)
    return found


def _drawing(cell: Cell) -> dict[Key, float]:
    path = storage.join(cell.path, pace.FILE)
    if not storage.exists(path):
        return {}
    return {("draw_seconds", ""): float(json.loads(storage.read_bytes(path))["seconds"])}


def cost_of(cell: Cell, log: Run | None) -> Cost:
    """What a cell took."""
    trained = cell.training
    logs = [run_state.find(part.path) for part in trained.chain[:-1]]
    spent = [run_state.times(one) if one is not None else None for one in [*logs, log]]
    seconds = math.fsum(math.nan if one is None else one.seconds for one in spent)
    taken = [
        max(column.y)
        for key in ("memory/gpu_bytes", "memory/process_bytes")
        if log is not None
        and (column := log.history.columns.get(key)) is not None
        and len(column.y)
    ]
    return Cost(
        num_images=sum(part.config.train.num_images for part in trained.chain),
        forward_macs=costs.network_macs(trained.config.model, trained.config.text.max_tokens),
        training_macs=trained.macs,
        drawing_macs=drawing_macs(trained.config, cell.config),
        training_seconds=seconds,
        memory_bytes=float(taken[0]) if taken else math.nan,
    )


def drawing_macs(trained: Config, config: Config) -> float:
    """Multiply-adds of drawing a picture: evaluations of the network, with a second row under guidance.

    Args:
        trained: of the training.
        config: of the evaluation.
    """
    sample, tokens, layers = config.sample, trained.text.max_tokens, trained.model.layers
    whole = costs.network_macs(trained.model, tokens)
    each_step = make_stepper(sample.sampler, None).evaluations
    evaluations = each_step * (sample.num_steps - 1) + 1
    low = alone = 0
    if sample.hand_over is not None:
        diffusion = LayeredDiffusion(trained.diffusion, layers)
        times = sampling_times(diffusion, sample.num_steps)[:-2]
        low = each_step * int((diffusion.logsnr_ref(times) < sample.hand_over).sum())
        alone = costs.network_macs(trained.model, tokens, layers[0])
    scales: Sequence[float] = sample.layer_guidance or (sample.guidance,)
    rows = 2 if any(scale != 1 for scale in scales) else 1
    return float(rows * (low * alone + (evaluations - low) * whole))
