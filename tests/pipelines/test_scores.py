"""All scores of a set of pictures, together and apart."""

import numpy as np

from layered_model.features import ExtractorSpec
from pipelines import scores
from pipelines.outcome import PARTS
from pipelines.statistics_files import Reference

SPEC = ExtractorSpec(
    name="clip", prefix="clip", dim=8, num_classes=5, preprocess="none", weights_sha256="0" * 64
)


def test_scores_computed_apart_are_those_computed_together() -> None:
    rng = np.random.default_rng(0)
    features, real = (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 70))
    logits = rng.normal(size=(60, 5)).astype(np.float32)
    reference = Reference.of_features(real, {})
    whole = scores.score(features, logits, reference, SPEC)
    assert {"fd_clip", "fd_clip_infinity", "kd_clip", "cmmd", "recall_clip", "is_clip"} < set(whole)
    apart = {}
    for measures in PARTS:
        part = scores.score(features, logits, reference, SPEC, measures=measures)
        assert not set(part) & set(apart)
        apart |= part
    assert scores.to_json(dict(sorted(apart.items()))) == scores.to_json(
        dict(sorted(whole.items()))
    )
    assert sorted(sum(PARTS, ())) == sorted(scores.MEASURES)
