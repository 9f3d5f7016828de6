"""From features in stores to scores: the last step of `evaluate`, in tasks of one thread, so that sums are in one order.

A task compares one series with the split's own pictures at one resolution. It reads Parquet files that others wrote, so its
result is the same wherever and however often it runs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from layered_model.features import ExtractorSpec
from pipelines import scores
from pipelines.feature_store import FeatureStore
from pipelines.kernels import clip_maximum_mean_discrepancy, clip_score
from pipelines.neighbours import nearest
from pipelines.scores import Measure, Scores
from pipelines.statistics_files import Reference

NUM_NEIGHBOURS = 3
"""Training pictures shown beside a picture."""
NUM_COMPARED = 1000
"""Pictures at most, from the first, of which the nearest training picture is looked for."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A series at one resolution beside the split's own pictures."""

    extractor: ExtractorSpec
    drawn: FeatureStore
    real: FeatureStore
    measures: tuple[Measure, ...] = scores.MEASURES

    def score(self) -> Scores:
        """Return the scores."""
        drawn, real = self.drawn.read_all(), self.real.read_all()
        return scores.score(
            drawn.features,
            drawn.logits,
            Reference(real.statistics(), real.features, self.real.num_images, {}),
            self.extractor,
            drawn.statistics(),
            self.measures,
        )


def score_reference(extractor: ExtractorSpec, real: FeatureStore) -> Scores:
    """Return the Inception-style score of real pictures."""
    return scores.class_score(real.read_all().logits, extractor)


def score_with_clip(
    clip: ExtractorSpec, drawn: FeatureStore, real: FeatureStore, captions: FeatureStore
) -> Scores:
    """Return CMMD and the CLIP score, from embeddings of pictures and captions."""
    of_drawn, of_real, of_captions = (
        store.read_all().features for store in (drawn, real, captions)
    )
    found = {
        "cmmd": clip_maximum_mean_discrepancy(of_drawn, of_real),
        "clip_score": clip_score(of_drawn, of_captions),
    }
    return {clip.score_name(name): scores.entry(value) for name, value in found.items()}


class Memorisation(NamedTuple):
    """How near pictures come to those the model was trained on."""

    median_distance: float
    "Of a drawn picture's features to those of the nearest training picture."
    median_distance_of_reference: float
    "The same of pictures that the model never saw."
    numbers: list[int]
    "Of the drawn pictures that come nearest, the nearest first."
    rows: list[list[int]]
    "For each, rows of the nearest training pictures."
    distances: list[list[float]]


def memorisation(
    drawn: FeatureStore, real: FeatureStore, training: FeatureStore, num_kept: int, num_shown: int
) -> Memorisation:
    """Look for the training pictures that drawn pictures are most like.

    Args:
        drawn: features of the drawn pictures.
        real: of real pictures outside the training split.
        training: of the training split, all at one resolution.
        num_kept: drawn pictures, from the first, that can be shown.
        num_shown: how many of those to show: the ones that come nearest.
    """
    k = min(NUM_NEIGHBOURS, training.num_images)
    distances, rows = _nearest(drawn, training, k)
    of_reference, _ = _nearest(real, training, 1)
    shown = np.argsort(distances[:num_kept, 0], kind="stable")[:num_shown]
    return Memorisation(
        float(np.median(distances[:, 0])),
        float(np.median(of_reference[:, 0])),
        shown.tolist(),
        rows[shown].tolist(),
        distances[shown].tolist(),
    )


def _nearest(
    queries: FeatureStore, training: FeatureStore, k: int
) -> tuple[Float[ndarray, "q k"], ndarray]:
    features = queries.read_first(NUM_COMPARED).features
    return nearest(features, (part.features for part in training.shards()), k)
