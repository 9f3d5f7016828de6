"""Statistics of reference pictures as ``.npz`` files, in the form that other tools have.

pytorch-fid and clean-fid both keep ``mu`` [d] and ``sigma`` [d, d], the mean and the covariance (n - 1) of the features. Neither
says in the file which network, weights or resize made them, or of how many pictures; clean-fid puts network and resize into the
file's *name*, and keeps features themselves as ``feats`` [n, d] of a file ``..._kid.npz``. `save` writes ``mu`` and ``sigma``, so
those tools read it, and beside them ``about``: a JSON text with the extractor, its weights, its resize and the number of
pictures, by which `load` refuses what does not belong together. Called by `folders` and `evaluation`.
"""

import io
import json
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float
from numpy import ndarray

from layered_model.features import ExtractorSpec
from pipelines import storage
from pipelines.errors import UserError
from pipelines.metrics import FeatureStatistics

CLEAN_MODES = {
    "legacy_tensorflow": "inception",
    "legacy_pytorch": "inception_pytorch",
    "clean": "inception_clean",
}
"""Resize in the names of clean-fid's files -> the extractor here that has it."""

_CLEAN_NAME = re.compile(
    r"_(clean|legacy_pytorch|legacy_tensorflow)(_clip_vit_b_32)?_[^_]+_[^_]+(_kid)?\.npz$"
)
_INDEFINITE = 1e-6
"""Eigenvalues below minus this share of the largest are no rounding."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What pictures are compared with."""

    statistics: FeatureStatistics
    features: Float[ndarray, "n d"] | None
    "Of each picture; None where only statistics are known."
    num_images: int | None
    "None where a file does not say."
    about: dict[str, Any]
    "What is known of its making."
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_features(
        cls,
        features: Float[ndarray, "n d"],
        about: dict[str, Any],
        warnings: tuple[str, ...] = (),
    ) -> "Reference":
        """Return a reference of which all features are known (n >= 2)."""
        statistics = FeatureStatistics.from_features(features)
        return cls(statistics, features, len(features), about, warnings)


def made_by(extractor: ExtractorSpec) -> dict[str, Any]:
    """What decides an extractor's features, for files and results."""
    return {
        "extractor": extractor.name,
        "extractor_sha256": extractor.weights_sha256,
        "preprocess": extractor.preprocess,
    }


def save(path: str, statistics: FeatureStatistics, extractor: ExtractorSpec, **about: Any) -> None:
    """Write statistics to a file that pytorch-fid, clean-fid and `load` read.

    Args:
        path: absolute, of the file.
        statistics: of the pictures.
        extractor: what their features come from.
        about: what else decides them; values of JSON.
    """
    text = json.dumps(made_by(extractor) | {"num_images": statistics.count} | about, sort_keys=True)
    _write(path, mu=statistics.mean, sigma=statistics.covariance(), about=np.array(text))


def save_features(path: str, features: Float[ndarray, "n d"], extractor: ExtractorSpec) -> None:
    """Write features as clean-fid keeps them for KID; arguments as `save`."""
    _write(path, feats=features, about=np.array(json.dumps(made_by(extractor), sort_keys=True)))


def load(path: str, extractor: ExtractorSpec) -> Reference:
    """Read statistics or features that one of the three tools wrote.

    Args:
        path: of the file.
        extractor: what the pictures compared with them are given to.

    Raises:
        UserError: the file is missing, is none of these, or comes from another extractor, other weights or another resize.
    """
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "feats", "about") if key in file}
            keys = sorted(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as statistics (.npz): {error}") from error
    about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    warnings = _check_origin(path, about, extractor)
    if "feats" in arrays:
        features = _checked(path, "feats", arrays["feats"], (None, extractor.dim), extractor)
        if len(features) < 2:
            raise UserError(f"{path}: features of {len(features)} picture; two are the least")
        return Reference.of_features(features, about, warnings)
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(
            f"{path}: holds {', '.join(keys) or 'nothing'}; statistics are 'mu' and 'sigma', or 'feats'"
        )
    mean = _checked(path, "mu", arrays["mu"], (extractor.dim,), extractor)
    sigma = _checked(path, "sigma", arrays["sigma"], (extractor.dim, extractor.dim), extractor)
    count = about.get("num_images")
    return Reference(_statistics(path, mean, sigma, count), None, count, about, warnings)


def _write(path: str, **arrays: ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    storage.write_atomically(path, buffer.getvalue())


def _check_origin(path: str, about: dict[str, Any], extractor: ExtractorSpec) -> tuple[str, ...]:
    """Refuse another extractor's statistics; warn where nothing tells whose they are."""
    ours = made_by(extractor)
    if about:
        different = [key for key, value in ours.items() if about.get(key) != value]
        if different:
            key = different[0]
            raise UserError(
                f"{path}: made with {key}={about.get(key)!r}, and the pictures are scored with "
                f"{ours[key]!r}; choose that extractor, or make the statistics again"
            )
        return ()
    named = _CLEAN_NAME.search(path.rpartition("/")[2])
    if named is None:
        return (
            f"{path} does not say what made it; its numbers compare only if that was "
            f"{extractor.name} with this resize: {extractor.preprocess}",
        )
    mode, clip = named[1], named[2]
    if clip or CLEAN_MODES.get(mode) != extractor.name:
        network = "clip_vit_b_32" if clip else "Inception"
        raise UserError(
            f"{path}: by its name clean-fid's statistics of {network} with the resize {mode!r}, and "
            f"the pictures are scored with {extractor.name} ({extractor.preprocess}); "
            "another resize moves FID by up to a fifth"
        )
    return ()


def _checked(
    path: str, key: str, array: ndarray, shape: tuple[int | None, ...], extractor: ExtractorSpec
) -> ndarray:
    wanted = [
        have if want is None else want for have, want in zip(array.shape, shape, strict=False)
    ]
    if array.ndim != len(shape) or list(array.shape) != wanted:
        raise UserError(
            f"{path}: {key} has shape {array.shape}, and the {extractor.dim} features of "
            f"{extractor.name} need {tuple('n' if want is None else want for want in shape)}: "
            "it is of another extractor"
        )
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise UserError(f"{path}: {key} must be finite floating-point numbers ({array.dtype})")
    return array


def _statistics(
    path: str,
    mean: Float[ndarray, " d"],
    sigma: Float[ndarray, "d d"],
    count: int | None,
) -> FeatureStatistics:
    """Statistics with these moments. Of an unknown number of pictures they count two, which leaves the moments as they are."""
    values, vectors = scipy.linalg.eigh(sigma.astype(np.float64), check_finite=False)
    if values[0] < -_INDEFINITE * abs(values[-1]) or not np.allclose(
        sigma, sigma.T, atol=_INDEFINITE * abs(values[-1])
    ):
        raise UserError(
            f"{path}: sigma is no covariance: its smallest eigenvalue is {values[0]:.3g}, its "
            f"largest {values[-1]:.3g}"
        )
    kept = values > 0
    count = count or 2
    factor = np.sqrt((count - 1) * values[kept])[:, None] * vectors[:, kept].T
    return FeatureStatistics(count=count, mean=mean.astype(np.float64), factor=factor)
