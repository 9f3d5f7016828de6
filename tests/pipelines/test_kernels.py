"""KID, CMMD and the CLIP score against torch-fidelity's numbers, direct sums and what theory says."""

import numpy as np
import pytest

from pipelines.kernels import (
    clip_maximum_mean_discrepancy,
    clip_score,
    kernel_inception_distance,
)


def sets() -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features; numbers below that are torch-fidelity's were computed from these."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / np.sqrt(24)
    return rng.normal(size=(230, 24)) @ mix + 0.1, rng.normal(size=(250, 24)) @ mix * 1.1


# torch_fidelity.metric_kid.kid_features_to_metric of torch-fidelity 0.4.0, given these arrays as float64 tensors.
TORCH_FIDELITY = {
    (100, 100): (0.06940927748945452, 0.04473361993438032),
    (230, 3): (0.0699646536369259, 0.00641055520864603),
}


@pytest.mark.parametrize(("size", "number"), TORCH_FIDELITY)
def test_kid_is_torch_fidelitys(size: int, number: int) -> None:
    found = kernel_inception_distance(*sets(), subset_size=size, num_subsets=number)
    expected = TORCH_FIDELITY[size, number]
    assert (found.distance.value, found.deviation) == pytest.approx(expected, rel=1e-12)


def test_kid_of_everything_is_the_direct_sum() -> None:
    x, y = (z[:40] for z in sets())
    kernel = lambda a, b: (a @ b / 24 + 1) ** 3  # noqa: E731
    within = [
        np.mean([kernel(z[i], z[j]) for i in range(40) for j in range(40) if i != j])
        for z in (x, y)
    ]
    between = np.mean([kernel(a, b) for a in x for b in y])
    found = kernel_inception_distance(x, y, subset_size=40, num_subsets=2)
    assert found.distance.value == pytest.approx(sum(within) - 2 * between, rel=1e-10)


def test_kid_has_no_bias_and_its_interval_holds_the_truth() -> None:
    """Of one distribution with itself: 0, whatever the size of subsets."""
    draws = [
        kernel_inception_distance(
            *np.random.default_rng(seed).normal(size=(2, 120, 8)), subset_size=60, num_subsets=20
        )
        for seed in range(100)
    ]
    values = np.array([draw.distance for draw in draws])
    assert abs(values[:, 0].mean()) < 3 * values[:, 0].std() / 10


def test_kid_refuses_subsets_larger_than_a_set() -> None:
    x, y = sets()
    with pytest.raises(
        ValueError, match=r"subset_size=1000 must be from 2 to 230.*\(230 and 250\)"
    ):
        kernel_inception_distance(x, y)


def test_kids_standard_error_is_the_deviation_over_draws() -> None:
    reference = np.random.default_rng(9).normal(size=(300, 8))
    draws = np.array(
        [
            kernel_inception_distance(
                np.random.default_rng(seed).normal(size=(200, 8)) * 1.2 + 0.3,
                reference,
                subset_size=100,
                num_subsets=30,
            ).distance
            for seed in range(60)
        ]
    )
    assert draws[:, 1].mean() == pytest.approx(draws[:, 0].std(ddof=1), rel=0.3)


def test_cmmd_is_the_published_formula() -> None:
    """1000 times the means over all pairs, i = i among them, of exp(-|x - y|^2 / (2 10^2)) of directions."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in sets())
    mean = lambda a, b: np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 200).mean()  # noqa: E731
    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    found = clip_maximum_mean_discrepancy(*sets())
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert clip_maximum_mean_discrepancy(5 * x, y).value == pytest.approx(found.value, rel=1e-12)
    assert clip_maximum_mean_discrepancy(x, x).value == pytest.approx(0, abs=1e-12)


def test_clip_score_is_the_mean_cosine_of_pairs_that_agree() -> None:
    images = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = np.array([[3.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    score = clip_score(images, texts)
    assert score.value == pytest.approx(100 * (1 + 0 + np.sqrt(0.5)) / 3)
    with pytest.raises(ValueError, match="embedding 1 is zero"):
        clip_score(images, texts * [[1], [0], [1]])
