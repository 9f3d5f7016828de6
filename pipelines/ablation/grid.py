"""What an experiment comes to: a grid of cells, each an evaluation of a training's model on a dataset, each with a directory.

Made by `cells`; run by `runner`, read by `findings` and whoever draws them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines import recipe, storage
from pipelines.ablation.experiment import Experiment, ScaleName
from pipelines.config import Config
from pipelines.schema import MANIFEST, RunDir


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset that a cell needs."""

    config: Config
    "That prepares it."
    identity: str
    "Decides its content."

    @property
    def path(self) -> str:
        """Its directory."""
        return self.config.dataset

    @property
    def finished(self) -> bool:
        """Whether it is there."""
        return storage.exists(storage.join(self.path, MANIFEST))


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model that a cell needs."""

    config: Config
    dataset: Dataset
    first: "Training | None"
    "The one whose model this one grows from."

    @property
    def path(self) -> str:
        """The run's directory."""
        return self.config.run

    @property
    def finished(self) -> bool:
        """Whether the model has seen all of its pictures."""
        path = storage.join(RunDir(self.path).model, "config.json")
        if not storage.exists(path):
            return False
        seen = json.loads(storage.read_bytes(path))["num_images_trained"]
        return bool(seen >= self.config.train.num_images)

    @property
    def chain(self) -> "list[Training]":
        """All that its model took, the first first."""
        return [*(self.first.chain if self.first else ()), self]

    @property
    def own_macs(self) -> int:
        """Multiply-adds of its steps."""
        return recipe.step_macs(self.config) * self.config.train.num_images

    @property
    def macs(self) -> int:
        """The same, with those of what it grows from."""
        return sum(part.own_macs for part in self.chain)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Levels and a seed."""

    levels: Mapping[str, str]
    seed: int
    training: Training
    config: Config
    "Of the evaluation, whose run is the cell's directory."

    @property
    def path(self) -> str:
        """The directory of the evaluation."""
        return self.config.run

    @property
    def finished(self) -> bool:
        """Whether there are scores."""
        return storage.exists(RunDir(self.path).scores)

    @property
    def label(self) -> str:
        """Its levels, in words."""
        return label(self.levels)


def label(levels: Mapping[str, str]) -> str:
    """Levels, in words: those of the factors, in their order."""
    return ", ".join(levels.values())


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for beside the experiment."""

    scale: ScaleName
    preset: str | None = None
    "In place of the scale's."
    seeds: tuple[int, ...] | None = None
    "In place of the scale's."
    overrides: tuple[str, ...] = ()
    "Of all cells, after the scale's and before the levels'."
    config_file: str | None = None
    store: str = "runs/ablate"
    "Directory of everything that is run, for all experiments."
    dataset: str | None = None
    "Prepared, in place of one that is prepared from the preset's data."
    data: str | None = None
    "Folder that `experiment.DATA` stands for."


@dataclass(frozen=True)
class Grid:
    """An experiment's cells."""

    name: str
    experiment: Experiment
    options: Options
    cells: list[Cell]
    left_out: list[dict[str, str]]
    "Combinations that need ``--data``."

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    def of(self, levels: Mapping[str, str]) -> list[Cell]:
        """Cells with these levels, one a seed."""
        return [cell for cell in self.cells if cell.levels == levels]

    @property
    def combinations(self) -> list[Mapping[str, str]]:
        """Levels of the cells, each once."""
        return list({cell.label: cell.levels for cell in self.cells}.values())
