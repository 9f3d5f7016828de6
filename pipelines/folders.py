"""Scores of a folder of anyone's pictures against another folder, or statistics: ``layered evaluate --generated DIR``.

All in this process, without Ray: threads decode ahead while the network, which takes ten to a hundred times as long, has every
core or the GPU. A cluster would have to see the folder, and starting Ray takes longer than scoring some hundred pictures. Many
pictures can be scored in several goes: with ``--features DIR`` features are kept shard by shard (`feature_store`), and what is
there is not computed again.

Writes a JSON file with the scores, everything that decides them, and warnings.
"""

import logging
import os
import platform
import re
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from layered_model.features import FeatureExtractor
from pipelines import extractors, scores, statistics_files, storage
from pipelines.config import fingerprint
from pipelines.errors import UserError
from pipelines.feature_store import Contents, FeatureStore
from pipelines.picture_folders import DECODING, PictureFolder, size_warnings
from pipelines.session import Progress, event
from pipelines.statistics_files import Reference, made_by

logger = logging.getLogger(__name__)

VERSION = 1
"""Of what decides features; stores of another are not taken for finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is compared, and how."""

    generated: str
    "Folder of the pictures to score."
    reference: str
    "Folder of real ones, or an .npz file of their statistics."
    extractor: str = "efficientnet_lite0"
    "Name in the registry."
    weights: str | None = None
    "Of the extractor: a file, local or on an object store, a directory or a name on the hub; None for the published ones."
    sha256: str | None = None
    "Of weights other than the published ones."
    device: str | None = None
    "None for the GPU where there is one."
    batch_size: int = 32
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    features: str | None = None
    "Directory that keeps features; None to keep none."
    save_statistics: str | None = None
    "File for the reference's statistics, or its features if it ends in _kid.npz as clean-fid's do; None for none."
    output: str = "metrics.json"
    "Of the result."

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if re.fullmatch(r"cpu|cuda(:\d+)?", self.device or "cpu") is None:
            raise UserError(f"--device {self.device} must be cpu, cuda or cuda:N")
        if (self.device or "cpu") != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device}: torch finds no GPU here")
        saved = self.save_statistics
        if saved is not None and not saved.endswith(".npz"):
            raise UserError(f"--save-statistics {saved} must end in .npz")


def run(settings: Settings) -> dict[str, Any]:
    """Score the pictures, print the table and write the result, which is returned.

    Raises:
        UserError: a folder, a picture, the statistics or the extractor cannot be used.
    """
    torch.set_num_threads(settings.threads)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    extractor = extractors.load_named(settings.extractor, device, settings.weights, settings.sha256)
    output = storage.absolute(settings.output)
    with ThreadPoolExecutor(settings.threads) as pool:
        try:
            result = _score(settings, extractor, pool)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result["environment"] = {
        "device": device,
        "threads": settings.threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for warning in result["warnings"]:
        logger.warning(warning)
    storage.write_atomically(output, scores.to_json(result))
    sys.stdout.write(f"{extractor.title}\n{scores.table(result['scores'])}\n")
    event(logger, "wrote", scores=output)
    return result


def _score(settings: Settings, extractor: FeatureExtractor, pool: Executor) -> dict[str, Any]:
    folders = [("generated", PictureFolder.open(settings.generated, "--generated", pool))]
    # All that can be wrong is found before the network is at it.
    reference = _statistics_of(settings, extractor)
    if reference is None:
        folders.append(("reference", PictureFolder.open(settings.reference, "--reference", pool)))
    for key, folder in folders:
        if len(folder.names) < scores.FEWEST:
            raise UserError(
                f"--{key} {folder.path}: holds {len(folder.names)} pictures; "
                f"{scores.FEWEST} are the least, and tens of thousands are usual"
            )
    warnings = size_warnings(folders)
    drawn = _features(settings, "generated", folders[0][1], extractor, pool)
    if reference is None:
        reference = _reference_of(settings, folders[1][1], extractor, pool)
    warnings += reference.warnings
    warnings += scores.sample_warnings(len(drawn.features), reference.num_images, extractor)
    return {
        "scores": scores.score(drawn.features, drawn.logits, reference, extractor),
        "settings": {
            **made_by(extractor),
            "decoding": DECODING,
            "batch_size": settings.batch_size,
            "generated": _about(folders[0][1]),
            "reference": reference.about,
            **scores.decide(len(drawn.features), reference.num_images),
        },
        "warnings": warnings,
    }


def _statistics_of(settings: Settings, extractor: FeatureExtractor) -> Reference | None:
    """What a statistics file says; None where the reference is a folder."""
    if not settings.reference.endswith(".npz"):
        return None
    if settings.save_statistics is not None:
        raise UserError(
            f"--save-statistics: --reference {settings.reference} is a file of statistics already"
        )
    return statistics_files.load(storage.absolute(settings.reference), extractor)


def _reference_of(
    settings: Settings, folder: PictureFolder, extractor: FeatureExtractor, pool: Executor
) -> Reference:
    features = _features(settings, "reference", folder, extractor, pool).features
    about = _about(folder)
    reference = Reference.of_features(features, about)
    if settings.save_statistics is not None:
        path = storage.absolute(settings.save_statistics)
        if path.endswith("_kid.npz"):
            statistics_files.save_features(path, features, extractor)
        else:
            statistics_files.save(path, reference.statistics, extractor, pictures=about)
        event(logger, "statistics", saved=path)
    return reference


def _features(
    settings: Settings,
    key: str,
    folder: PictureFolder,
    extractor: FeatureExtractor,
    pool: Executor,
) -> Contents:
    """Features and logits of all pictures of a folder; those that are kept are not computed again."""
    decides = {
        "version": VERSION,
        **made_by(extractor),
        "decoding": DECODING,
        "batch_size": settings.batch_size,
        "pictures_sha256": folder.sha256,
    }
    root = storage.absolute(settings.features) if settings.features else ""
    store = FeatureStore(
        path=storage.join(root, f"{extractor.name}-{fingerprint(decides)}"),
        num_images=len(folder.names),
        dim=extractor.dim,
        num_classes=extractor.num_classes or 0,
        settings=decides,
    )
    keeps = settings.features is not None
    missing = set(store.missing() if keeps else range(store.num_shards))
    parts = []
    total = sum(len(store.images(shard)) for shard in missing)
    with Progress(key, total, "images") as progress:
        for shard in range(store.num_shards):
            if shard not in missing:
                parts.append(store.read(shard))
                continue
            parts.append(
                _extract(folder, store, shard, extractor, settings.batch_size, pool, progress)
            )
            if keeps:
                store.write(shard, parts[-1])
    return Contents.join(parts)


def _extract(
    folder: PictureFolder,
    store: FeatureStore,
    shard: int,
    extractor: FeatureExtractor,
    batch_size: int,
    pool: Executor,
    progress: Progress,
) -> Contents:
    images = store.images(shard)
    features = np.empty((len(images), store.dim), dtype=np.float32)
    logits = np.empty((len(images), store.num_classes), dtype=np.float32)
    for places, pixels in folder.batches(images, batch_size, pool):
        found = extractor(torch.from_numpy(pixels))
        features[places] = found.features.cpu().numpy()
        if found.logits is not None:
            logits[places] = found.logits.cpu().numpy()
        progress.update(len(places))
    return Contents(features, logits if store.num_classes else None)


def _about(folder: PictureFolder) -> dict[str, Any]:
    return {
        "path": folder.path,
        "num_images": len(folder.names),
        "sizes": folder.count_sizes(),
        "sha256": folder.sha256,
    }
