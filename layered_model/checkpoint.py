"""A model at rest: ``config.json`` and ``model.safetensors`` in one directory, without a pickle.

The configuration holds everything that is needed to use the weights as they were trained: the network's shape, the diffusion
(schedules belong to the checkpoint), which text encoder, and how to sample by default. It names the weights by their SHA-256,
which is checked on loading. Directories may be local or anything fsspec opens, such as ``s3://bucket/model``. Called by
`pipeline` and the training stage.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

import safetensors.torch
from torch import Tensor

from layered_model.diffusion import DiffusionConfig
from layered_model.shape import UNetConfig
from layered_model.steppers import SamplerKind
from layered_model.text import EncoderInfo

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
"""Version of `config.json`; any other is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """How pictures are drawn where the caller does not say."""

    sampler: SamplerKind
    "Which sampler."
    num_steps: int
    "Network evaluations of a picture."
    guidance: float
    "w in uncond + w (cond - uncond); 1 is off."


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything about a model but its weights."""

    network: UNetConfig
    diffusion: DiffusionConfig
    text: EncoderInfo
    sampling: SamplingDefaults
    num_images_trained: int = 0
    "Pictures that the weights have seen, counting repeats."

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


def encode(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The directory's files, by name, in the order to write them: the configuration last, as the sign of completeness."""
    content = safetensors.torch.save(
        {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    )
    description = {
        "format": FORMAT,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
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
    config, expected = _load_config(path)
    content = _read(path, WEIGHTS_FILE)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path}/{WEIGHTS_FILE} is damaged: its SHA-256 is {found}, {CONFIG_FILE} says {expected}"
        )
    return config, safetensors.torch.load(content), found


def load_config(path: str) -> ModelConfig:
    """Configuration alone of a model's directory; errors as `load`."""
    return _load_config(path)[0]


def _load_config(path: str) -> tuple[ModelConfig, str | None]:
    location = f"{path.rstrip('/')}/{CONFIG_FILE}"
    try:
        description = json.loads(_read(path, CONFIG_FILE))
        if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        expected = description.pop("weights_sha256", None)
        return ModelConfig.from_dict(description), expected
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


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
