"""From an experiment to what is run: configurations, directories named by what decides their content, and what comes before what.

    cell = levels of all factors, and a seed  ->  a training, maybe one that it grows from, and an evaluation of its model

A directory's name ends with a hash of all that decides what will be in it, and of nothing else. So cells that differ in drawing
alone share a training, cells of several experiments that are the same are run once, and a cell that is there is never run again.
Called by `pipelines.ablate`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from layered_model.noise import kernel_of
from pipelines import recipe, storage
from pipelines.ablation import experiment
from pipelines.ablation.experiment import Experiment
from pipelines.ablation.grid import Cell, Dataset, Grid, Options, Training, label
from pipelines.config import Config, UserError, fingerprint, load_config
from pipelines.dataset import PreparedDataset
from pipelines.schema import RunDir

VERSIONS = {"datasets": 1, "trained": 1, "cells": 2}
"""Of what equal settings come to; raised with a change of the code that makes other numbers of them."""

_PREPARED = ("text.batch_size", "text.num_actors", "data.rows_per_file")
_RUNNING = (
    *(
        f"train.{name}"
        for name in (
            "compile",
            "cpus_per_worker",
            "trackers",
            "log_every_images",
            "checkpoint_every_images",
            "num_checkpoints_kept",
            "keep_checkpoints_every_images",
            "keep_best_checkpoint",
            "grid_every_images",
            "checkpoint_upper_layers",
            "max_failures",
            "grow_from",
        )
    ),
    *(
        f"evaluate.{name}"
        for name in (
            "num_samplers",
            "cpus_per_sampler",
            "num_extractors",
            "cpus_per_extractor",
            "references",
            "model",
        )
    ),
)
"""Keys that do not decide what a training or an evaluation comes to. What it grows from is told apart by its own hash."""

Speed = Callable[[Config, Config], float]
"""Seconds of training on a picture with the first configuration, by those with the second."""


def make_grid(name: str, found: Experiment, options: Options, speed: Speed) -> Grid:
    """Settles every cell of an experiment.

    Args:
        name: of the experiment.
        found: the experiment.
        options: what is asked for.
        speed: is asked where a level's budget is time.

    Raises:
        UserError: a configuration is wrong; says of which level.
    """
    loaded: dict[str, Config] = {}
    makers = [_Maker(found, options, seed, speed, loaded) for seed in _seeds(found, options)]
    left_out = []
    cells = []
    for levels in found.combinations():
        contents = [found.level(*pair, options.scale) for pair in levels.items()]
        if options.data is None and experiment.needs_data(contents):
            left_out.append(levels)
            continue
        cells += [maker.cell(levels) for maker in makers]
    # Seed by seed: whoever stops early has whole grids.
    cells.sort(key=lambda cell: [maker.seed for maker in makers].index(cell.seed))
    return Grid(name, found, options, cells, left_out)


def _seeds(found: Experiment, options: Options) -> Sequence[int]:
    return options.seeds or found.scale(options.scale).seeds


class _Maker:
    """Makes the cells of one seed.

    Args:
        found: the experiment.
        options: what is asked for.
        seed: of all configurations.
        speed: see `make_grid`.
        loaded: configurations of any seed by their keys, which takes a while to load.
    """

    def __init__(
        self,
        found: Experiment,
        options: Options,
        seed: int,
        speed: Speed,
        loaded: dict[str, Config],
    ) -> None:
        self.found, self.options, self.seed, self.speed = found, options, seed, speed
        self.loaded = loaded
        scale = found.scale(options.scale)
        self.preset = options.preset or scale.preset
        self.common = [
            *experiment.overrides(scale.overrides, options.data),
            *options.overrides,
        ]
        self.base = self._load({}, "")
        if self.base.train.grow_from is not None:
            raise UserError(
                f"train.grow_from={self.base.train.grow_from!r}: an experiment's models begin with fresh weights, or grow from "
                "what a level names as first"
            )

    def cell(self, levels: Mapping[str, str]) -> Cell:
        """A cell with its trainings."""
        told = ", ".join(f"{factor} {level}" for factor, level in levels.items())
        trained = self._training(self._merged(levels, "training"), levels, told)
        config = self._load(self._merged(levels, "drawing"), told)
        evaluation = dataclasses.replace(
            config,
            dataset=trained.dataset.path,
            evaluate=dataclasses.replace(config.evaluate, model=RunDir(trained.path).model),
        )
        path = self._path("cells", _decisive(config, "sample.", "evaluate."), _last(trained.path))
        return Cell(
            levels=levels,
            seed=self.seed,
            training=trained,
            config=dataclasses.replace(evaluation, run=path),
        )

    def _merged(self, levels: Mapping[str, str], concerns: str) -> dict[str, Any]:
        """Keys and values of those levels that concern the one or the other."""
        found: dict[str, Any] = {}
        for factor, level in levels.items():
            if self.found.factors[factor].concerns == concerns:
                found |= self.found.level(factor, level, self.options.scale)
        return found

    def _training(self, level: Mapping[str, Any], levels: Mapping[str, str], told: str) -> Training:
        keys = {k: v for k, v in level.items() if k not in ("images", "budget", "first")}
        first = None
        if (before := level.get("first")) is not None:
            first = self._training(before, levels, f"{told}: first")
        config = _normal(self._load(keys, told))
        dataset = self._dataset(config)
        number = self._num_images(level, levels, config, first)
        config = _with_images(config, number)
        if first is not None:
            train = dataclasses.replace(config.train, grow_from=RunDir(first.path).model)
            config = dataclasses.replace(config, train=train)
        decides = _decisive(config, "seed", "model.", "diffusion.", "train.")
        path = self._path("trained", decides, dataset.identity, first and _last(first.path))
        config = dataclasses.replace(config, dataset=dataset.path, run=path)
        return Training(config=config, dataset=dataset, first=first)

    def _num_images(
        self,
        level: Mapping[str, Any],
        levels: Mapping[str, str],
        config: Config,
        first: "Training | None",
    ) -> int:
        """Pictures of a training: the configuration's, a share of the base's, or as many as cost the baseline's."""
        if "images" in level:
            return round(float(level["images"]) * self.base.train.num_images)
        if "budget" not in level:
            return config.train.num_images
        others = self.found.compared_with(levels)
        if not others:
            raise UserError(
                f"baselines: {label(levels)} has a budget, and is compared with no cell"
            )
        other = others[0]
        merged = self._merged(other, "training")
        if "budget" in merged:
            raise UserError(
                f"baselines: the level of {label(other)} has a budget, which is a share of the baseline's"
            )
        baseline = self._training(merged, other, "baseline")
        macs = level["budget"] == "macs"
        return images_for(config, first, baseline, _by_macs if macs else self.speed)

    def _dataset(self, config: Config) -> Dataset:
        """Of the resolution of all cells of this data; of a higher one where the model needs that."""
        if self.options.dataset is not None and config.data == self.base.data:
            path = storage.absolute(self.options.dataset)
            identity = PreparedDataset.open(path).manifest.fingerprint
            return Dataset(config=dataclasses.replace(config, dataset=path), identity=identity)
        top = max(self.base.model.resolutions[-1], config.model.resolutions[-1])
        enough = config if config.model.resolutions[-1] == top else self.base
        prepared = dataclasses.replace(enough, data=config.data, text=config.text, seed=0)
        decides = _decisive(prepared, "data.", "text.")
        path = self._path("datasets", decides, top, seed=False)
        return Dataset(config=dataclasses.replace(prepared, dataset=path), identity=_last(path))

    def _path(self, kind: str, *decides: Any, seed: bool = True) -> str:
        identity = fingerprint(VERSIONS[kind], *decides)[:12]
        name = [self.preset, *([str(self.seed)] if seed else []), identity]
        return storage.join(storage.absolute(self.options.store), kind, "-".join(name))

    def _load(self, keys: Mapping[str, Any], told: str) -> Config:
        own = list(experiment.overrides(keys, self.options.data))
        if (key := "\n".join(own)) not in self.loaded:
            try:
                found = load_config(self.preset, [*self.common, *own], self.options.config_file)
            except UserError as error:
                where = f" (cell {told})" if told else f" (scale {self.options.scale})"
                raise UserError(f"{error}{where}") from error
            self.loaded[key] = found
        return dataclasses.replace(self.loaded[key], seed=self.seed)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def images_for(config: Config, first: Training | None, baseline: Training, relative: Speed) -> int:
    """Pictures with which a training costs what the baseline does, what it grows from included; whole batches.

    Args:
        config: of the training.
        first: that it grows from.
        baseline: that grows from none.
        relative: cost of a picture with one configuration, by that with another.

    Raises:
        UserError: what it grows from costs as much already.
    """
    budget = float(baseline.config.train.num_images)
    for part in first.chain if first else ():
        budget -= part.config.train.num_images * relative(part.config, baseline.config)
    size = config.train.batch_size
    steps = round(budget / relative(config, baseline.config) / size)
    if steps < 1:
        raise UserError("first: costs as much as the whole baseline; give it fewer images")
    return steps * size


def _by_macs(config: Config, other: Config) -> float:
    return recipe.step_macs(config) / recipe.step_macs(other)


def _with_images(config: Config, number: int) -> Config:
    """Another length of training, with rise and fall of the learning rate in proportion; whole batches."""
    train = config.train
    number = max(1, round(number / train.batch_size)) * train.batch_size
    share = number / train.num_images
    changed = dataclasses.replace(
        train,
        num_images=number,
        warmup_images=round(train.warmup_images * share),
        cooldown_images=round(train.cooldown_images * share),
    )
    return dataclasses.replace(config, train=changed)


def _normal(config: Config) -> Config:
    """Of several ways to say the same, one: so that equal trainings have equal names."""
    diffusion = config.diffusion
    natural = kernel_of(diffusion.noise)
    changes: dict[str, Any] = {
        "picture_kernel": None if diffusion.kernel == natural else diffusion.kernel,
        "extra_logsnr": diffusion.extra_logsnr if any(diffusion.extra_logsnr) else (),
    }
    weights = diffusion.layer_weights
    changes["layer_weights"] = weights if len(set(weights)) > 1 else ()
    shared = diffusion.noise != "independent"
    leaks = not diffusion.matched or len(set(changes["extra_logsnr"])) > 1
    changes["allow_leak"] = shared and leaks and diffusion.allow_leak
    return dataclasses.replace(config, diffusion=dataclasses.replace(diffusion, **changes))


def _decisive(config: Config, *prefixes: str) -> dict[str, Any]:
    """Dotted keys and values that decide a result, of those that begin with one of the prefixes."""
    return {
        key: value
        for key, value in _flat(dataclasses.asdict(config))
        if key.startswith(prefixes) and key not in (*_RUNNING, *_PREPARED)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
