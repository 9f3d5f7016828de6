"""All scores of a set of pictures, by name, from their features; and what must be said about them.

Names follow the extractor. Inception's are the published ones: ``fid``, ``fid_infinity``, ``kid``, ``is``, ``precision``,
``recall``, ``density``, ``coverage``. Another extractor's have its prefix, and are not called FID and KID: ``fd_lite0``,
``fd_lite0_infinity``, ``kd_lite0``. CLIP's come with ``cmmd``. Each is an object with ``value``, ``standard_error`` and
``interval``, of 95 %; ``is`` and ``kid`` have the ``deviation`` over splits or subsets too, which is what other tools print.
Called by `folders` and `scoring`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxtyping import Float
from numpy import ndarray

from layered_model.features import ExtractorSpec
from pipelines.estimates import Estimate
from pipelines.frechet import (
    FIRST_SHARE,
    LARGEST_FIRST_POINT,
    TRUSTED_RATIO,
    frechet_estimate,
    frechet_infinity,
)
from pipelines.kernels import (
    NUM_SUBSETS,
    SUBSET_SIZE,
    clip_maximum_mean_discrepancy,
    kernel_inception_distance,
)
from pipelines.metrics import SHUFFLE_SEED, FeatureStatistics, inception_score_of
from pipelines.neighbours import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    neighbourhood,
)
from pipelines.statistics_files import Reference

LEVEL = 0.95
NUM_SPLITS = 10
"""Of the Inception score, as everywhere."""
SEED = 0
"""Of the subsets and groups that are our own; those of torch-fidelity have its seed."""
FEWEST = 20
"""Pictures with which anything is scored."""


Measure = Literal["distance", "limit", "kernel", "neighbours", "classes"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

Scores = dict[str, dict[str, Any]]
"""By name; see `entry`."""


def decide(num_images: int, num_references: int | None) -> dict[str, Any]:
    """What decides the scores beside features and reference, for the result.

    Args:
        num_images: pictures that are scored.
        num_references: those of the reference; None where that is not known.
    """
    sizes = [SUBSET_SIZE, num_images, *([num_references] if num_references else [])]
    return {
        "is_splits": NUM_SPLITS,
        "kid_subsets": NUM_SUBSETS,
        "kid_subset_size": min(sizes),
        "shuffle_seed": SHUFFLE_SEED,
        "infinity_first": min(LARGEST_FIRST_POINT, int(FIRST_SHARE * num_images)),
        "infinity_seed": SEED,
        "precision_neighbours": PRECISION_NEIGHBOURS,
        "density_neighbours": DENSITY_NEIGHBOURS,
        "interval": f"{LEVEL:.0%}, of drawing as many pictures anew; the reference is taken as it is",
    }


def score(
    features: Float[ndarray, "n d"],
    logits: Float[ndarray, "n classes"] | None,
    reference: Reference,
    extractor: ExtractorSpec,
    statistics: FeatureStatistics | None = None,
    measures: Sequence[Measure] = MEASURES,
) -> Scores:
    """Return all scores that can be had: by neighbours and kernels only where the reference has features.

    Args:
        features: of the pictures, in their order.
        logits: of the same.
        reference: what they are compared with.
        extractor: what both were made with.
        statistics: those of `features`, where they are known already.
        measures: which; they may be computed apart.
    """
    found: Scores = {}
    name = extractor.score_name("fd")
    if {"distance", "limit"} & set(measures):
        distance = frechet_estimate(features, reference.statistics, statistics)
        if "distance" in measures:
            found[name] = entry(distance)
        if "limit" in measures:
            limit = frechet_infinity(features, reference.statistics, distance, seed=SEED)
            found[f"{name}_infinity"] = entry(limit)
    if reference.features is not None and "kernel" in measures:
        kid = kernel_inception_distance(
            features,
            reference.features,
            subset_size=min(SUBSET_SIZE, len(features), len(reference.features)),
        )
        found[extractor.score_name("kd")] = entry(kid.distance, kid.deviation)
        if extractor.name == "clip":
            cmmd = clip_maximum_mean_discrepancy(features, reference.features)
            found[extractor.score_name("cmmd")] = entry(cmmd)
    if reference.features is not None and "neighbours" in measures:
        near = neighbourhood(features, reference.features, seed=SEED)
        for measure, estimate in near._asdict().items():
            share = measure != "density"
            found[extractor.score_name(measure)] = entry(estimate, share=share)
    if "classes" in measures:
        found |= class_score(logits, extractor)
    return found


def class_score(logits: Float[ndarray, "n classes"] | None, extractor: ExtractorSpec) -> Scores:
    """Return the Inception-style score, if the extractor knows classes."""
    if logits is None:
        return {}
    inception = inception_score_of(logits, NUM_SPLITS)
    return {extractor.score_name("is"): entry(inception.score, inception.deviation)}


def entry(
    estimate: Estimate, deviation: float | None = None, *, share: bool = False
) -> dict[str, Any]:
    """How a result holds a score; the interval of a share ends at 0 and 1."""
    ends = estimate.interval(LEVEL)
    found: dict[str, Any] = {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "interval": [min(max(end, 0.0), 1.0) for end in ends] if share else list(ends),
    }
    return found if deviation is None else found | {"deviation": deviation}


def to_json(result: dict[str, Any]) -> bytes:
    """A result as a JSON file, with null for what is not finite, which JSON has not."""
    return (json.dumps(_plain(result), indent=2) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sample_warnings(
    num_images: int, num_references: int | None, extractor: ExtractorSpec
) -> list[str]:
    """What must be said of the numbers of pictures."""
    said = []
    distance = extractor.score_name("fd")
    for kind, number in (("generated", num_images), ("reference", num_references)):
        if number is not None and number < extractor.dim:
            said.append(
                f"{number} {kind} pictures are fewer than the {extractor.dim} features of "
                f"{extractor.name}: {distance} is biased upwards by about c/N; compare it only with "
                f"equal numbers, or look at {distance}_infinity, which has most of that taken out, and nearly all "
                f"of it from {TRUSTED_RATIO * extractor.dim} pictures on"
            )
    return said


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores as lines of text: value, 95 % interval, and what other tools write after the plus-minus sign."""
    width = max(map(len, scores))
    lines = [f"{'':{width}}  {'value':>10}  {'95 % interval':>23}"]
    for name, entry in scores.items():
        ends = [f"{end:.5g}" for end in entry["interval"]]
        interval = (
            f"{ends[0]:>10} to {ends[1]:>9}" if math.isfinite(entry["standard_error"]) else ""
        )
        line = f"{name:{width}}  {entry['value']:>10.5g}  {interval:>23}"
        if "deviation" in entry:
            line += f"  (deviation {entry['deviation']:.3g})"
        lines.append(line)
    return "\n".join(lines)
