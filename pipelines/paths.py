"""Which settings are paths, and what they are to processes that stand elsewhere.

A relative path is of the directory in which a stage was started. Ray's workers stand where Ray was started, and those of a
submitted job in its copy of the source, so `placed` goes to them. What a run or a dataset writes down of its settings stays as
the user gave it.
"""

import os
from dataclasses import replace
from typing import Any

from pipelines import storage
from pipelines.config import Config

_WITH_RUN = ("train", "evaluate", "sample", "serve", "demo")

PATHS = {
    "dataset": ("prepare", *_WITH_RUN),
    "run": _WITH_RUN,
    "data.train_annotations": ("prepare", "demo"),
    "data.train_images": ("prepare", "demo"),
    "data.val_annotations": ("prepare", "demo"),
    "data.val_images": ("prepare", "demo"),
    "train.grow_from": ("train",),
    "evaluate.model": ("evaluate",),
    "evaluate.references": ("evaluate", "demo"),
    "serve.keys_file": ("serve",),
}
"""Keys whose value is a path or null, and the stages that read or write there."""

PATHS_OR_NAMES = {
    "evaluate.extractor_weights": ("train", "evaluate", "demo"),
    "evaluate.clip_weights": ("evaluate", "demo"),
    "text.encoder": ("prepare", *_WITH_RUN),
}
"""Keys whose value is a path where there is such a file, and otherwise a name on a model hub, a package's, or null."""


def used(stage: str, config: Config) -> dict[str, str]:
    """The paths that a stage reads and writes, as configured, by the key that names them."""
    found = {}
    for key, stages in (PATHS | PATHS_OR_NAMES).items():
        path = _get(config, key)
        if stage in stages and path is not None and (key in PATHS or os.path.exists(path)):
            found[key] = path
    return found


def placed(config: Config) -> Config:
    """The same with paths that mean the same in other directories.

    All but ``text.encoder``, which is compared with the name that a dataset has of its encoder. ``package:`` stays: it means what
    each process has installed, and a stage needs none of what it does not read.
    """
    for key in (PATHS | PATHS_OR_NAMES).keys() - {"text.encoder"}:
        path = _get(config, key)
        if path is not None and not path.startswith("package:"):
            config = _with(config, key, storage.absolute(path) if key in PATHS else located(path))
    return config


def located(name: str) -> str:
    """A path or a name, so that it means the same in other directories."""
    return storage.absolute(name) if os.path.exists(name) else name


def _get(config: Config, key: str) -> str | None:
    section, _, name = key.rpartition(".")
    path: str | None = getattr(getattr(config, section) if section else config, name)
    return path


def _with(config: Config, key: str, path: str) -> Config:
    section, _, name = key.rpartition(".")
    value: dict[str, Any] = {name: path}
    return replace(
        config, **({section: replace(getattr(config, section), **value)} if section else value)
    )
