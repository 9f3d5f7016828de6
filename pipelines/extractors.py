"""The feature extractor that a user names, with weights from a path, an object store, a package or their publisher.

`layered_model.features` does the rest; what it knows nothing of is here: object stores, and the names by which a user is told of
a mistake. `extraction` and `running_score` load by the keys of a configuration, `folders` by options of the command line.
"""

import re
from typing import NamedTuple

import torch

from layered_model import inception
from layered_model.extractor import FeatureExtractor
from layered_model.features import load_extractor
from pipelines import storage
from pipelines.errors import UserError
from pipelines.sections import EvaluateConfig


class Names(NamedTuple):
    """What the user calls the settings."""

    extractor: str
    weights: str
    sha256: str


KEYS = Names("evaluate.extractor", "evaluate.extractor_weights", "evaluate.extractor_sha256")
OPTIONS = Names("--extractor", "--weights", "--sha256")


def load(options: EvaluateConfig, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load the extractor of a configuration.

    Raises:
        UserError: as `load_named`.
    """
    weights, sha256 = options.extractor_weights, options.extractor_sha256
    return load_named(options.extractor, device, weights, sha256, KEYS)


def load_named(
    name: str,
    device: str | torch.device,
    weights: str | None,
    sha256: str | None,
    names: Names = OPTIONS,
) -> FeatureExtractor:
    """Load an extractor.

    Args:
        name: in the registry.
        device: where it computes.
        weights: of an Inception network the file, local or on an object store; of DINOv2 and CLIP a directory or a name on the
            model hub. None for the published ones.
        sha256: of the weights file, for weights other than the published ones.
        names: what the user calls the three.

    Raises:
        UserError: there is no such extractor, there are no such weights, they are not the published ones or those stated, or a
            package is missing. One line, which names the settings.
    """
    if sha256 is not None and re.fullmatch("[0-9a-f]{64}", sha256) is None:
        raise UserError(f"{names.sha256}={sha256!r} must be 64 digits from 0 to f")
    try:
        content = _content(name, weights)
        return load_extractor(name, device, weights=content, sha256=sha256)
    except (ValueError, OSError) as error:
        given = f"{names.extractor}={name!r}"
        if weights is not None:
            given += f", {names.weights}={weights!r}"
        hint = _hint(weights, sha256, names) if name in inception.PREPROCESS else ""
        raise UserError(f"{given}: {error}{hint}") from error


def _content(name: str, weights: str | None) -> str | bytes | None:
    """Weights as `layered_model.features` takes them."""
    if weights is None:
        return None
    remote = storage.is_remote(weights)
    if name in inception.PREPROCESS:
        return storage.read_bytes(weights) if remote else storage.absolute(weights)
    if remote:
        raise ValueError("takes a local directory or a name on the model hub: copy it from there")
    return weights


def _hint(weights: str | None, sha256: str | None, names: Names) -> str:
    """Which settings say something else."""
    if weights is None:
        return f" as {names.weights}"
    if sha256 is None:
        return (
            f"; weights of one's own need {names.sha256}, and give scores that are not called fid"
        )
    return ""
