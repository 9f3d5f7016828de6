"""What an experiment is, and its file: a question, factors with their levels, cells, scales, metrics.

A file is YAML, as strict as ``ray_config.yaml``: a key written twice or unknown, a wrong type, a level that no cell uses are one
error that names the file and the key. docs/ablations.md says how to write one. Called by `cells` and `pipelines.ablate`.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import DictConfig, OmegaConf

from pipelines.ablation.paired import Direction
from pipelines.config import UserError, told

FOLDER = Path(__file__).resolve().parents[1] / "experiments"
"""Of the experiments that come along."""

COMMON = FOLDER / "common.yaml"
"""What all files begin with: the scales."""

ScaleName = Literal["small", "full"]
SCALES: tuple[ScaleName, ...] = get_args(ScaleName)

DATA = "{data}"
"""In a level's values: the folder that ``--data`` names. Without it the level's cells are left out."""

BUDGETS = ("macs", "time")
DRAWING = ("sample.", "evaluate.")
"""Beginnings of the keys that change nothing about training."""

METRICS = {
    "fd": "Frechet distance of features",
    "is": "Inception-style score",
    "kd": "kernel distance of features",
    "precision": "share of pictures that look real",
    "recall": "share of real pictures that look drawn",
    "density": "how densely real pictures lie around the drawn ones",
    "coverage": "share of real pictures with a drawn one near",
    "train_loss": "squared error of the output in training, unweighted, in the last lines of the log",
    "val_loss": "the same of pictures that are not trained on",
    "control": "share of the band that follows the other caption",
    "draw_seconds": "seconds of drawing a picture",
}
"""What can be asked for, and what it is."""

WAYS: dict[Direction, str] = {
    "lower": "lower is better",
    "higher": "higher is better",
    "none": "shown, not judged",
}
"""What a metric's direction says to readers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How large an experiment is run."""

    preset: str
    "Of ``ray_config.yaml``."
    overrides: dict[str, Any]
    "Of that preset, for all cells: dotted key -> value."
    seeds: tuple[int, ...]
    "A training each, of every cell."
    takes: str
    "Which hardware and how long, in words."


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """Both of them."""

    small: Scale
    full: Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """Something that is varied."""

    about: str
    "What it is, in words."
    concerns: str
    "'training'; or 'drawing', whose levels share one trained model."
    levels: dict[str, dict[str, Any]]
    """By name: dotted keys of the configuration and their values, or ``small`` and ``full`` with such. A level of training may
    have ``images`` (share of the baseline's pictures), ``budget`` (``macs`` or ``time``: as many pictures as cost the
    baseline's), and ``first`` (keys of a training that comes before, and whose model this one grows from)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What a file says."""

    title: str
    question: str
    "In plain words."
    claim: str
    "What the paper says to it."
    notes: tuple[str, ...] = ()
    "What has to be known to read the numbers."
    scales: Scales
    factors: dict[str, Factor]
    cells: list[dict[str, str]] = field(default_factory=list)
    "Each a level of every factor; empty for all combinations."
    baselines: list[dict[str, str]]
    "Levels that others are compared with: for each entry, a cell with the one that has these, and its own of all other factors, "
    "where there is one."
    metrics: dict[str, str]
    "Names -> 'lower', 'higher' (is better) or 'none' (shown, not judged); the first is what conclusions are drawn from."
    curve: dict[str, str] = field(default_factory=dict)
    "For a chart of the first metric: ``across``, one of `ACROSS`, and ``factor``, of which each level has a curve; "
    "empty for none."

    def scale(self, name: ScaleName) -> Scale:
        """One of the scales."""
        return cast(Scale, getattr(self.scales, name))

    def combinations(self) -> list[dict[str, str]]:
        """Every cell: factor -> level."""
        if self.cells:
            return [dict(cell) for cell in self.cells]
        each = ([(name, level) for level in factor.levels] for name, factor in self.factors.items())
        return [dict(pairs) for pairs in itertools.product(*each)]

    def compared_with(self, cell: Mapping[str, str]) -> list[dict[str, str]]:
        """The cells that one is compared with, in the order of `baselines`; no two cells are compared both ways round."""
        there, found = self.combinations(), []
        for number, baseline in enumerate(self.baselines):
            other = {**cell, **baseline}
            turned = any({**other, **earlier} == cell for earlier in self.baselines[:number])
            if other != cell and other in there and other not in found and not turned:
                found.append(other)
        return found

    def level(self, factor: str, level: str, scale: ScaleName) -> dict[str, Any]:
        """A level's keys and values at a scale."""
        found = self.factors[factor].levels[level]
        return dict(found[scale]) if set(found) == set(SCALES) else dict(found)

    def direction(self, metric: str) -> Direction:
        """Which way is better."""
        return cast(Direction, self.metrics[metric])


ACROSS = ("draw_seconds", "drawing_macs")
"""What a chart of curves can have across: seconds, or multiply-adds, of drawing a picture."""


def names() -> list[str]:
    """Of the experiments that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path != COMMON)


def load(name: str) -> tuple[str, Experiment]:
    """An experiment that comes along, or a file.

    Args:
        name: ``e2``, or the path of a YAML file.

    Returns:
        Its short name, and what the file says.

    Raises:
        UserError: there is none, or something is wrong with it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        if path.parent == FOLDER:
            raise UserError(
                f"experiment {name!r} must be one of {', '.join(names())}, or a file that ends with .yaml"
            ) from error
        raise UserError(f"experiment file {path}: {error.strerror or error}") from error
    return path.stem, read(text, str(path))


def read(text: str, source: str) -> Experiment:
    """What the text of a file says.

    Args:
        text: YAML.
        source: for messages.

    Raises:
        UserError: something is wrong with it.
    """
    suffix = f" ({source})"
    with told(suffix):
        tree = OmegaConf.create(text)
        if not isinstance(tree, DictConfig):
            raise ValueError("an experiment must be a mapping of keys and values")
        common = OmegaConf.create(COMMON.read_text(encoding="utf-8"))
        merged = OmegaConf.merge(OmegaConf.structured(Experiment), common, tree)
        found = OmegaConf.to_object(merged)
        assert isinstance(found, Experiment)
        _check(found)
    return found


def _check(found: Experiment) -> None:
    """What the parts of an experiment must satisfy together.

    Raises:
        ValueError: names the key.
    """
    if not found.factors:
        raise ValueError("factors: there must be one at least")
    for name, factor in found.factors.items():
        _check_factor(f"factors.{name}", factor)
    combinations = found.combinations()
    for number, cell in enumerate(found.cells):
        _check_cell(f"cells.{number}", cell, found.factors)
        if cell in found.cells[:number]:
            raise ValueError(f"cells.{number}: {cell} is there already")
    if not found.baselines:
        raise ValueError("baselines: there must be one at least")
    for number, baseline in enumerate(found.baselines):
        key = f"baselines.{number}"
        named = {name: factor for name, factor in found.factors.items() if name in baseline}
        if not baseline or set(baseline) != set(named):
            raise ValueError(f"{key}={baseline} must name levels of {', '.join(found.factors)}")
        _check_cell(key, {name: baseline[name] for name in named}, named)
    for cell in combinations:
        if not any({**cell, **baseline} in combinations for baseline in found.baselines):
            raise ValueError(f"baselines: there is no such cell to compare {cell} with")
    for name, factor in found.factors.items():
        used = {cell[name] for cell in combinations}
        if unused := [level for level in factor.levels if level not in used]:
            raise ValueError(f"factors.{name}.levels.{unused[0]}: no cell uses it")
    if not found.metrics:
        raise ValueError("metrics: there must be one at least")
    for metric, direction in found.metrics.items():
        if metric not in METRICS:
            raise ValueError(f"metrics.{metric}: must be one of {', '.join(METRICS)}")
        if direction not in get_args(Direction):
            raise ValueError(
                f"metrics.{metric}={direction!r} must be one of {', '.join(get_args(Direction))}"
            )
    if found.curve and (
        set(found.curve) != {"across", "factor"}
        or found.curve["across"] not in ACROSS
        or found.curve["factor"] not in found.factors
    ):
        raise ValueError(
            f"curve={found.curve} must have across ({', '.join(ACROSS)}) and factor ({', '.join(found.factors)})"
        )
    for name in SCALES:
        seeds = found.scale(name).seeds
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(
                f"scales.{name}.seeds={list(seeds)} must be different numbers from 0 on"
            )


def _check_factor(key: str, factor: Factor) -> None:
    if factor.concerns not in ("training", "drawing"):
        raise ValueError(f"{key}.concerns={factor.concerns!r} must be 'training' or 'drawing'")
    if len(factor.levels) < 1:
        raise ValueError(f"{key}.levels: there must be one at least")
    for level, content in factor.levels.items():
        by_scale = set(content) & set(SCALES)
        if by_scale and set(content) != set(SCALES):
            raise ValueError(
                f"{key}.levels.{level}: must hold {' and '.join(SCALES)} and nothing else, or neither of them"
            )
        for part in content.values() if by_scale else [content]:
            _check_level(f"{key}.levels.{level}", part, factor.concerns)


def _check_level(key: str, content: object, concerns: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{key}={content!r} must be a mapping of keys and values")
    for name, value in content.items():
        where = f"{key}.{name}"
        if name in ("images", "budget", "first"):
            if concerns != "training":
                raise ValueError(f"{where}: is of training, and the factor concerns drawing")
            _check_special(where, name, value)
        elif "." not in str(name):
            raise ValueError(
                f"{where}: must be a dotted key of the configuration, images, budget or first"
            )
        elif str(name).startswith(DRAWING) != (concerns == "drawing"):
            sections = " and ".join(f"{section}*" for section in DRAWING)
            raise ValueError(
                f"{where}: the factor concerns {concerns}; {sections} concern drawing, all other keys training"
            )
    if {"images", "budget"} <= set(content):
        raise ValueError(f"{key}: images and budget exclude each other")


def _check_special(where: str, name: str, value: object) -> None:
    if name == "budget" and value not in BUDGETS:
        raise ValueError(f"{where}={value!r} must be one of {', '.join(BUDGETS)}")
    if name == "images" and not (
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    ):
        raise ValueError(f"{where}={value!r} must be a number above 0")
    if name == "first":
        _check_level(where, value, "training")
        if isinstance(value, Mapping) and {"first", "budget"} & set(value):
            raise ValueError(f"{where}: must hold keys of the configuration, or images")


def _check_cell(key: str, cell: Mapping[str, str], factors: Mapping[str, Factor]) -> None:
    if list(cell) != list(factors):
        raise ValueError(f"{key}: must name a level of {', '.join(factors)}, in this order")
    for name, level in cell.items():
        if level not in factors[name].levels:
            raise ValueError(
                f"{key}.{name}={level!r} must be one of {', '.join(factors[name].levels)}"
            )


def overrides(values: Mapping[str, Any], data: str | None) -> Iterator[str]:
    """Keys and values as they are given on the command line.

    Args:
        values: as a level or a scale holds them; without ``images``, ``budget`` and ``first``.
        data: what `DATA` stands for.
    """
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        yield f"{key}={text.replace(DATA, json.dumps(data or '')[1:-1])}"


def needs_data(levels: Sequence[Mapping[str, Any]]) -> bool:
    """Whether levels can be run only where ``--data`` is given."""
    return any(DATA in json.dumps(dict(level)) for level in levels)
