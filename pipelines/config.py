"""The configuration: one tree of frozen dataclasses, read from ``ray_config.yaml``.

A file holds ``base`` and ``presets``. The configuration of a run is

    base <- presets[name] <- overrides "a.b=value", in the order given

merged by OmegaConf against the types below, which refuses a key written twice, an unknown key, a wrong type and a missing
value. What one field must satisfy alone is checked in its section, what several sections must satisfy together in `Config`.
Every mistake a user can make becomes a `UserError` of one line that starts with the dotted key, shows the value, and says
what would be right. No field has a default here: the file is the one place where values live.

`layered_model`'s own configuration classes stand in the tree as they are. Called by `cli`; every stage takes a `Config`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import MarkedYAMLError

from layered_model.crop import Box
from layered_model.diffusion import DiffusionConfig, LayeredDiffusion
from layered_model.inputs import check_crop
from layered_model.shape import UNetConfig
from layered_model.steppers import SamplerKind
from pipelines.errors import UserError as UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Pictures and captions. Paths are local, ``s3://`` or ``package:name/path``."""

    train_annotations: str | None
    """Captions of the training split: a ``.json`` of COCO's form, for example ``annotations/captions_train2017.json``; a
    ``.parquet`` file or a folder of them, a row a picture; null where each picture has a ``.txt`` beside it, a caption a line."""
    train_images: str | None
    "Folder of the training split's pictures; null where the Parquet rows hold them."
    val_annotations: str | None
    "Captions of the validation split, in the same ways."
    val_images: str | None
    "Folder of the validation split's pictures; null for both means that there is no such split."
    image_column: str
    "Column of Parquet rows with the picture: bytes, a struct of ``bytes`` and ``path``, or a file's name."
    caption_column: str
    "Column of Parquet rows with the caption or the list of captions."
    id_column: str | None
    "Column of Parquet rows with the picture's number; null numbers the rows."
    crop: Literal["center", "random"]
    "Which square of a picture is kept: the middle, or one that the picture's id decides."
    image_format: Literal["png", "webp", "jpeg"]
    "Encoding of the prepared pictures; png and webp are lossless. A file that is such a square already is kept as it is."
    image_quality: int
    "Quality of jpeg, 1 to 100; the lossless formats ignore it."
    max_pixels: int
    "Larger pictures are rejected before they are decoded, which takes about 8 bytes a pixel of a worker's memory."
    rows_per_file: int
    "Pictures in one Parquet file."
    max_reject_fraction: float
    "Preparing fails when more than this fraction of the pictures cannot be used, in [0, 1]."

    def __post_init__(self) -> None:
        _check(1 <= self.image_quality <= 100, "image_quality", self, "from 1 to 100")
        _check_positive(self, "rows_per_file", "max_pixels")
        _check_fraction(self, "max_reject_fraction")
        if self.train_annotations is None and self.train_images is None:
            raise ValueError("train_annotations=None must be given, or train_images, or both")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The frozen text encoder."""

    encoder: str
    """Name on the model hub, a directory, or ``package:name/path`` for a directory inside an installed package. ``none`` prepares
    pictures and captions without embeddings, for another `prepare` to read."""
    revision: str | None
    "Commit of the model on the hub; null for a directory."
    max_tokens: int
    "Longer captions are cut here."
    precision: Literal["float32", "bfloat16"]
    "Of the encoder's weights and arithmetic; embeddings are stored as float16."
    batch_size: int
    "Captions encoded together, of like length."
    num_actors: int
    "Copies of the encoder working side by side: one for each GPU or, without GPUs, for each CPU."

    def __post_init__(self) -> None:
        _check_positive(self, "max_tokens", "batch_size", "num_actors")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Training. Lengths count pictures seen, so that they do not change with the batch size."""

    num_images: int
    "Pictures to train on, counting repeats."
    batch_size: int
    "Pictures of one optimizer step, over all workers."
    num_workers: int
    "Processes, each with a copy of the model."
    cpus_per_worker: float
    "CPUs that Ray reserves for a worker, which decodes pictures in as many threads."
    use_gpu: bool
    "Give each worker a GPU."
    optimizer: Literal["adamw", "muon"]
    "AdamW, or Muon for the convolutions and AdamW for the rest: more per step, fewer steps. See `pipelines.optimizers`."
    learning_rate: float
    "Peak of the learning rate, of one scale for both optimizers."
    warmup_images: int
    "The learning rate rises linearly over this many pictures."
    cooldown_images: int
    "It falls linearly to zero over the last so many pictures; 0 for not at all."
    weight_decay: float
    "Decoupled weight decay, times the learning rate."
    grad_clip: float
    "Largest norm of the gradient."
    ema_relative_width: float
    "Width of the averaged weights' window relative to the length of training, in (0, 0.28]."
    ema_decay: float | None
    "Average with this fixed decay instead, for example 0.9999; null for the relative width."
    ema_snapshot_widths: tuple[float, ...]
    """Widths that are averaged beside and kept at each checkpoint, from which any other can be made after training, for example
    [0.05, 0.1]; each takes a model's room at each checkpoint. Empty for none. See `pipelines.snapshots`."""
    text_dropout: float
    "Fraction of pictures trained without their caption, which guidance needs; in [0, 1]."
    precision: Literal["float32", "bfloat16"]
    "Of the network's arithmetic; weights, noise and loss stay float32."
    checkpoint_upper_layers: bool
    "Compute the layers above the trunk again on the way back in place of keeping their activations: less memory, more time."
    crop_resolution: int | None
    """Side, in pixels of the top, of the random square on which the layers above the trunk are trained while the trunk sees the
    whole picture; null for all of it. Needs model.upper_norm=pixel."""
    grow_from: str | None
    "Directory of a trained model with fewer resolutions, whose weights the lower layers start from; null for none."
    log_every_images: int
    "Pictures between two lines of metrics."
    checkpoint_every_images: int
    "Pictures between two checkpoints."
    num_checkpoints_kept: int
    "Older checkpoints are deleted."
    grid_every_images: int
    "Pictures between two grids of samples."
    max_failures: int
    "How often a lost worker is replaced and training goes on from the last checkpoint."

    def __post_init__(self) -> None:
        _check_positive(
            self,
            "num_images",
            "batch_size",
            "num_workers",
            "cpus_per_worker",
            "learning_rate",
            "grad_clip",
            "log_every_images",
            "checkpoint_every_images",
            "num_checkpoints_kept",
            "grid_every_images",
        )
        _check_not_negative(
            self, "warmup_images", "cooldown_images", "weight_decay", "max_failures"
        )
        _check(
            0.0 < self.ema_relative_width <= 0.28, "ema_relative_width", self, "above 0, up to 0.28"
        )
        if self.ema_decay is not None:
            _check(0.0 <= self.ema_decay < 1.0, "ema_decay", self, "from 0 to below 1, or null")
        widths = self.ema_snapshot_widths
        distinct = len(set(widths)) == len(widths) and all(0.0 < width <= 0.28 for width in widths)
        _check(distinct, "ema_snapshot_widths", self, "distinct numbers above 0, up to 0.28")
        _check_fraction(self, "text_dropout")
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"train.num_workers={self.num_workers}, so that every worker gets equally many"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How pictures are drawn from a trained model."""

    sampler: SamplerKind
    "DPM-Solver++(2M), flow or SDE; DDIM; DDPM; or Heun, which evaluates the model twice a step."
    num_steps: int
    "Steps from noise to a picture; 20 to 30 do for dpmpp_2m, 50 or more for ddim, hundreds for ddpm."
    guidance: float
    "w in uncond + w (cond - uncond); 1 is off."

    def __post_init__(self) -> None:
        _check_positive(self, "num_steps")
        _check_not_negative(self, "guidance")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Scores of the trained model at every resolution."""

    split: Literal["train", "val"]
    "Whose captions are drawn, and whose pictures are the reference."
    num_images: int
    "Pictures drawn. A distance of Frechet's kind is biased by c/N, so compare equal numbers only."
    batch_size: int
    "Pictures drawn together."
    num_actors: int
    "Processes that draw and extract features, each with a copy of the model."
    cpus_per_actor: float
    "CPUs that Ray reserves for one of them."
    extractor: Literal["efficientnet_lite0"]
    "Network whose features are compared; it names the scores."
    untrained: bool
    "Score the same network with fresh weights too, as a yardstick."

    def __post_init__(self) -> None:
        _check_positive(self, "batch_size", "num_actors", "cpus_per_actor")
        _check(self.num_images >= 2, "num_images", self, "at least 2, to have a covariance")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Ray. The first two matter only where a stage starts a local Ray, not where it joins a cluster."""

    num_cpus: int | None
    "Logical CPUs of a local Ray; null for what the machine has."
    object_store_bytes: int | None
    "Memory of a local Ray's object store; null lets Ray decide."
    shared_paths: bool
    "Say that every node of a cluster sees local paths, for example over NFS; s3:// needs no such promise."

    def __post_init__(self) -> None:
        if self.num_cpus is not None:
            _check_positive(self, "num_cpus")
        if self.object_store_bytes is not None:
            least = 75 * 2**20
            _check(
                self.object_store_bytes >= least,
                "object_store_bytes",
                self,
                f"at least {least}, which Ray needs",
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
    ray: RayConfig

    def __post_init__(self) -> None:
        _check_not_negative(self, "seed")
        for key in ("dataset", "run"):
            _check(bool(getattr(self, key)), key, self, "the path of a directory")
        if self.dataset == self.run:
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
        with _told(f" ({path}, {label})"):
            merged = _merge(merged, part or {}, {"preset": preset})
    for override in overrides:
        merged = _merge_override(merged, override)
    return _build(merged)


def from_yaml(text: str, source: str = "config.yaml", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `to_yaml` wrote, with overrides on top.

    Raises:
        UserError: naming ``source``, where the text is not a whole configuration.
    """
    with _told(f" ({source})"):
        merged = _merge(OmegaConf.structured(Config), OmegaConf.create(text))
    for override in overrides:
        merged = _merge_override(merged, override)
    return _build(merged, f" ({source})")


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
    with _told(f" ({path})"):
        tree = OmegaConf.create(text)
    if not isinstance(tree, DictConfig) or set(tree) != {"base", "presets"}:
        raise UserError(f"config file {path} must hold the two keys base and presets")
    return tree


def _merge(*parts: object) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*cast(Any, parts)))


def _merge_override(merged: DictConfig, override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise UserError(f"override {override!r} must look like section.key=value")
    if key == "preset":
        raise UserError(f"{override}: choose a preset with --preset {value}")
    with _told(key=key, value=value):
        return _merge(merged, OmegaConf.from_dotlist([override]))


def _build(merged: DictConfig, suffix: str = "") -> Config:
    """The dataclasses of a merged tree; section by section, so that an error can name its section."""
    values: dict[str, Any] = {}
    for field in fields(Config):
        with _told(suffix), _named(field.name):
            node = merged[field.name]
            values[field.name] = OmegaConf.to_object(node) if isinstance(node, DictConfig) else node
    with _told(suffix):
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
def _told(suffix: str = "", *, key: str = "", value: str = "") -> Iterator[None]:
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


def _check(condition: bool, name: str, section: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={getattr(section, name)!r} must be {expected}")


def _check_positive(section: object, *names: str) -> None:
    for name in names:
        _check(getattr(section, name) > 0, name, section, "above 0")


def _check_not_negative(section: object, *names: str) -> None:
    for name in names:
        _check(getattr(section, name) >= 0, name, section, "0 or above")


def _check_fraction(section: object, name: str) -> None:
    _check(0.0 <= getattr(section, name) <= 1.0, name, section, "from 0 to 1")
