"""The configuration: one tree of frozen dataclasses, read from ``ray_config.yaml``.

A file holds ``base`` and ``presets``. The configuration of a run is

    base <- presets[name] <- overrides "a.b=value", in the order given

merged by OmegaConf against the types of `sections`, which refuses a key written twice, an unknown key, a wrong type and a
missing value. What one field must satisfy alone is checked in its section, what several sections must satisfy together in
`Config`. Every mistake a user can make becomes a `UserError` of one line that starts with the dotted key, shows the value, and
says what would be right.

`layered_model`'s own configuration classes stand in the tree as they are. Called by `cli`; every stage takes a `Config`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from layered_model.checkpoint import CONFIG_FILE
from layered_model.crop import Box
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.inputs import check_crop
from layered_model.shape import UNetConfig
from pipelines import storage
from pipelines.errors import UserError as UserError
from pipelines.sections import (
    DataConfig,
    EvaluateConfig,
    RayConfig,
    SampleConfig,
    ServeConfig,
    TextConfig,
    TrainConfig,
    check,
    check_not_negative,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that decides what a run does."""

    preset: str
    "Name of the preset this began as."
    dataset: str
    "Directory of the prepared dataset; local or ``s3://``."
    run: str
    "Directory of the run; local or ``s3://``."
    seed: int
    "Of weights, order, noise and samples."
    data: DataConfig
    text: TextConfig
    model: UNetConfig
    diffusion: DiffusionConfig
    train: TrainConfig
    sample: SampleConfig
    evaluate: EvaluateConfig
    serve: ServeConfig
    ray: RayConfig

    def __post_init__(self) -> None:
        check_not_negative(self, "seed")
        for key in ("dataset", "run"):
            check(bool(getattr(self, key)), key, self, "the path of a directory")
        places = [storage.absolute(path) for path in (self.dataset, self.run)]
        if places[0] == places[1]:
            raise ValueError(f"run={self.run!r} must differ from dataset, which holds other files")
        with _named("diffusion"):
            LayeredDiffusion(self.diffusion, self.model.layers)
        if self.train.crop_resolution is not None:
            _check_crop_resolution(self.train.crop_resolution, self.model)


def load_config(
    preset: str, overrides: Sequence[str] = (), config_file: str | Path | None = None
) -> Config:
    """The configuration of a preset with overrides ``"a.b=value"`` on top.

    Args:
        preset: name under ``presets``.
        overrides: later ones win; values are YAML, so ``model.resolutions=[16,32]`` is a list.
        config_file: another file of the same form as ``ray_config.yaml``.

    Raises:
        UserError: whatever is wrong with file, preset or overrides.
    """
    path = Path(config_file or default_file())
    tree = _read(path)
    presets = tree["presets"]
    if preset not in presets:
        raise UserError(f"preset={preset!r} must be one of {', '.join(map(str, presets))} ({path})")
    merged = OmegaConf.structured(Config)
    for label, part in (("base", tree["base"]), (f"presets.{preset}", presets[preset])):
        with told(f" ({path}, {label})"):
            merged = _merge(merged, part or {}, {"preset": preset})
    merged = _merge_overrides(merged, overrides)
    return _build(merged)


def from_yaml(text: str, source: str = "config.yaml", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `to_yaml` wrote, with overrides on top.

    Raises:
        UserError: naming ``source``, where the text is not a whole configuration.
    """
    with told(f" ({source})"):
        merged = _merge(OmegaConf.structured(Config), OmegaConf.create(text))
    merged = _merge_overrides(merged, overrides)
    return _build(merged, f" ({source})")


def load_run_config(run: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of an earlier run, with overrides on top.

    Raises:
        UserError: there is no such run, or its configuration cannot be used.
    """
    source = storage.join(run, "config.yaml")
    try:
        text = storage.read_bytes(storage.absolute(source)).decode()
    except FileNotFoundError as error:
        if storage.exists(storage.join(storage.absolute(run), CONFIG_FILE)):
            raise UserError(
                f"run={run!r} is a model's directory, without the settings of a run: give --preset NAME too"
            ) from error
        raise UserError(f"run={run!r}: no {source}; train first, or give --preset NAME") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run={run!r}: {source} cannot be read: {error}") from error
    return from_yaml(text, source, overrides)


def to_yaml(config: Config) -> str:
    """All of the configuration as YAML, resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def fingerprint(*sections: object) -> str:
    """16 hex digits that depend on every value of the given dataclasses or plain values, and on nothing else."""
    values = [
        asdict(cast(Any, section)) if _is_section(section) else section for section in sections
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    before: object, after: object, prefix: str = ""
) -> list[tuple[str, object, object]]:
    """Every field in which two configurations or sections of one type differ.

    Returns:
        Dotted key, value before, value after; empty when they are equal.
    """
    found: list[tuple[str, object, object]] = []
    for field in fields(cast(Any, before)):
        key, old, new = prefix + field.name, getattr(before, field.name), getattr(after, field.name)
        if _is_section(old):
            found += differences(old, new, key + ".")
        elif old != new:
            found.append((key, old, new))
    return found


def preset_names(config_file: str | Path | None = None) -> list[str]:
    """Names of the presets in a configuration file, in its order."""
    return [str(name) for name in _read(Path(config_file or default_file()))["presets"]]


def default_file() -> Path:
    """``ray_config.yaml``: beside this module where the package is installed, one folder up in a checkout."""
    here = Path(__file__).resolve().parent
    return next(
        folder / "ray_config.yaml"
        for folder in (here, here.parent)
        if (folder / "ray_config.yaml").is_file()
    )


def _is_section(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _read(path: Path) -> DictConfig:
    """A file with exactly the keys ``base`` and ``presets``."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path}: {error}") from error
    with told(f" ({path})"):
        tree = OmegaConf.create(text)
    if not isinstance(tree, DictConfig) or set(tree) != {"base", "presets"}:
        raise UserError(f"config file {path} must hold the two keys base and presets")
    if not isinstance(tree["presets"], DictConfig):
        raise UserError(f"config file {path}: presets must hold names with their settings")
    return tree


def _merge(*parts: object) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*cast(Any, parts)))


def _merge_overrides(merged: DictConfig, overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise UserError(f"override {override!r} must look like section.key=value")
        if key == "preset":
            raise UserError(f"{override}: choose a preset with --preset {value}")
    try:  # all at once, which is quicker, for each merge copies everything
        return _merge(merged, *(OmegaConf.from_dotlist([override]) for override in overrides))
    except (OmegaConfBaseException, MarkedYAMLError):  # one by one, to know which is at fault
        for override in overrides:
            key, _, value = override.partition("=")
            with told(key=key, value=value):
                merged = _merge(merged, OmegaConf.from_dotlist([override]))
        return merged


def _build(merged: DictConfig, suffix: str = "") -> Config:
    """The dataclasses of a merged tree; section by section, so that an error can name its section."""
    values: dict[str, Any] = {}
    for field in fields(Config):
        with told(suffix), _named(field.name):
            node = merged[field.name]
            values[field.name] = OmegaConf.to_object(node) if isinstance(node, DictConfig) else node
    with told(suffix):
        return Config(**values)


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Puts a section's name before the field that a ValueError of its own begins with."""
    try:
        yield
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise UserError(f"{section}.{error}") from error


@contextmanager
def told(suffix: str = "", *, key: str = "", value: str = "") -> Iterator[None]:
    """Turns what OmegaConf and YAML raise into one line: dotted key, value, what is wrong with it, and where."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: missing, must be given{suffix}") from error
    except OmegaConfBaseException as error:
        problem = (
            str(error).partition("\n")[0].replace("$VALUE_TYPE", "list").replace("$VALUE", value)
        )
        raise UserError(f"{error.full_key or key}: {problem}{suffix}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        where = f"{key}={value}" if key else f"line {line}"
        raise UserError(f"{where}: {error.problem}{suffix}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}{suffix}") from error


def _check_crop_resolution(side: int, model: UNetConfig) -> None:
    ratio = model.resolutions[-1] // model.resolutions[0]
    if side % ratio or not 0 < side <= model.resolutions[-1]:
        raise ValueError(
            f"train.crop_resolution={side} must be a multiple of {ratio}, a pixel of the lowest "
            f"layer, up to {model.resolutions[-1]}"
        )
    try:
        check_crop(model, Box(0, 0, side // ratio, side // ratio))
    except ValueError as error:
        raise ValueError(f"train.crop_resolution={side}: {error}") from error
