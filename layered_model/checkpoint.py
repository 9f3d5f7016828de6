"""A model at rest: ``config.json`` and ``model.safetensors`` in one directory, without a pickle.

The configuration holds everything that is needed to use the weights as they were trained: the network's shape, the diffusion
(schedules belong to the checkpoint), which text encoder, and how to sample by default. It names the weights by their SHA-256,
which is checked on loading. The text encoder is named, or lies in ``text_encoder/`` beside them, checked in the same way.
Directories may be local or anything fsspec opens, such as ``s3://bucket/model``. Called by `pipeline` and the training stage.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor

from layered_model.diffusion import DiffusionConfig
from layered_model.shape import UNetConfig
from layered_model.steppers import SamplerKind, make_stepper
from layered_model.text import EncoderInfo, TextEncoder, commit_of, content_hash

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TEXT_ENCODER = "text_encoder"
"""Directory of a text encoder that goes with the model."""
FORMAT = 1
"""Version of `config.json`; any other is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """How pictures are drawn where the caller does not say."""

    sampler: SamplerKind
    "Which sampler."
    num_steps: int
    "Steps of a picture."
    guidance: float
    "w in uncond + w (cond - uncond); 1 is off."
    fuse_weight: float = 1.0
    "How far lower layers decide their band of the picture, in [0, 1]; 0 is the top layer alone."

    def __post_init__(self) -> None:
        make_stepper(self.sampler)
        if not 0 <= self.fuse_weight <= 1:
            raise ValueError(f"fuse_weight={self.fuse_weight} must be from 0 to 1")
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance={self.guidance} must be a finite number")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything about a model but its weights."""

    network: UNetConfig
    diffusion: DiffusionConfig
    text: EncoderInfo
    sampling: SamplingDefaults
    num_images_trained: int = 0
    "Pictures that the weights have seen, counting repeats."

    def __post_init__(self) -> None:
        if self.text.width != self.network.text_width:
            raise ValueError(
                f"text.width={self.text.width} must be the network's text_width, {self.network.text_width}"
            )
        if not isinstance(self.num_images_trained, int) or self.num_images_trained < 0:
            raise ValueError(
                f"num_images_trained={self.num_images_trained!r} must be a whole number from 0 on"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``, also after a round trip through JSON.

        A section's field that has a default may be missing: it is what models were before they could say it.

        Raises:
            ValueError: if a key is missing, unknown or out of range.
        """
        _check_keys(cls, values, {field.name for field in fields(cls)})
        return cls(
            network=_section(UNetConfig, values["network"]),
            diffusion=_section(DiffusionConfig, values["diffusion"]),
            text=_section(EncoderInfo, values["text"]),
            sampling=_section(SamplingDefaults, values["sampling"]),
            num_images_trained=values["num_images_trained"],
        )


def _check_keys(kind: Any, values: Any, required: set[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} must be an object, not {values!r}")
    names = {field.name for field in fields(kind)}
    if missing := required - set(values):
        raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    if unknown := set(values) - names:
        raise ValueError(f"{kind.__name__} knows no {', '.join(sorted(unknown))}")


def _section(kind: Any, values: Any) -> Any:
    """A flat dataclass whose lists in JSON are tuples."""
    required = {field.name for field in fields(kind) if field.default is MISSING}
    _check_keys(kind, values, required)
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except TypeError as error:  # a value that cannot be compared with its bounds
        raise ValueError(f"{kind.__name__}: {error}") from error


def encode(
    config: ModelConfig, weights: Mapping[str, Tensor], text_encoder: Path | None = None
) -> dict[str, bytes]:
    """The directory's files, by name, in the order to write them: the configuration last, as the sign of completeness.

    Args:
        config: Everything but the weights.
        weights: The network's.
        text_encoder: The model's own `TEXT_ENCODER` directory, already written; None if the encoder is named only.
    """
    content = safetensors.torch.save(
        {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    )
    description = {
        "format": FORMAT,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        **({"text_encoder_sha256": content_hash(text_encoder)} if text_encoder else {}),
        **asdict(config),
    }
    return {
        WEIGHTS_FILE: content,
        CONFIG_FILE: (json.dumps(description, indent=2) + "\n").encode(),
    }


def load(path: str) -> tuple[ModelConfig, dict[str, Tensor], str]:
    """Configuration, weights on the CPU and the weights' SHA-256 of a model's directory.

    Raises:
        FileNotFoundError: if it is not a model's directory.
        ValueError: if the configuration is none of this format or the weights are damaged; names the file.
    """
    config, sums = _load_config(path)
    content = _read(path, WEIGHTS_FILE)
    found = hashlib.sha256(content).hexdigest()
    _check_sum(f"{path}/{WEIGHTS_FILE}", found, sums.get("weights_sha256"))
    return config, safetensors.torch.load(content), found


def load_config(path: str) -> ModelConfig:
    """Configuration alone of a model's directory; errors as `load`."""
    return _load_config(path)[0]


def load_text_encoder(
    info: EncoderInfo, path: str | None = None, device: torch.device | str = "cpu"
) -> TextEncoder:
    """The encoder that a model was trained with: from the model's directory if it lies there, otherwise by its name.

    Args:
        info: The model's own.
        path: The model's directory, if it has one.
        device: Where to compute.

    Raises:
        ValueError: if it cannot be loaded, or its weights are not those of training.
    """
    expected = _load_config(path)[1].get("text_encoder_sha256") if path else None
    if path and expected:
        import fsspec

        files, root = fsspec.url_to_fs(f"{path.rstrip('/')}/{TEXT_ENCODER}")
        with tempfile.TemporaryDirectory(prefix="text-encoder-") as directory:
            copy = Path(directory, TEXT_ENCODER)
            files.get(root, str(copy), recursive=True)
            _check_sum(f"{path}/{TEXT_ENCODER}", content_hash(copy), expected)
            encoder = TextEncoder.from_pretrained(
                str(copy), max_tokens=info.max_tokens, device=device
            )
        encoder.info = info
        return encoder
    encoder = TextEncoder.from_pretrained(
        info.name, revision=commit_of(info.weights), max_tokens=info.max_tokens, device=device
    )
    if encoder.info.weights != info.weights:
        raise ValueError(
            f"text encoder {info.name} has weights {encoder.info.weights}, "
            f"but the model was trained with {info.weights}"
        )
    return encoder


def _load_config(path: str) -> tuple[ModelConfig, dict[str, str]]:
    """The configuration, and the SHA-256 of what lies beside it."""
    location = f"{path.rstrip('/')}/{CONFIG_FILE}"
    try:
        description = json.loads(_read(path, CONFIG_FILE))
        if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        names = [name for name in description if name.endswith("_sha256")]
        sums = {name: description.pop(name) for name in names}
        return ModelConfig.from_dict(description), sums
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def _check_sum(location: str, found: str, expected: str | None) -> None:
    if found != expected:
        raise ValueError(
            f"{location} is damaged: its SHA-256 is {found}, {CONFIG_FILE} says {expected}"
        )


def _read(path: str, name: str) -> bytes:
    import fsspec

    location = f"{path.rstrip('/')}/{name}"
    try:
        with fsspec.open(location, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{location} is missing: {path} is not a model's directory"
        ) from error
