"""Precision, recall, density and coverage against torch-fidelity's numbers and direct definitions."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from pipelines import neighbours
from pipelines.neighbours import nearest, neighbourhood


def _sets(n: int = 230, m: int = 250) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24)) / np.sqrt(24)
    return rng.normal(size=(n, 24)) @ mix + 0.1, rng.normal(size=(m, 24)) @ mix * 1.1


def test_precision_and_recall_are_torch_fidelitys() -> None:
    """torch_fidelity.metric_prc.prc_features_to_metric of torch-fidelity 0.4.0: 0.873913049697876 and 0.648, in float32."""
    found = neighbourhood(*_sets())
    assert found.precision.value == pytest.approx(201 / 230, rel=1e-12)
    assert found.recall.value == pytest.approx(162 / 250, rel=1e-12)


def test_all_four_are_their_definitions() -> None:
    x, y = _sets(60, 70)
    between = cdist(x, y)
    of_x, of_y = np.sort(cdist(x, x), axis=1), np.sort(cdist(y, y), axis=1)
    found = neighbourhood(x, y)
    assert found.precision.value == (between <= of_y[:, 3]).any(1).mean()
    assert found.recall.value == (between <= of_x[:, 3][:, None]).any(0).mean()
    assert found.density.value == pytest.approx((between <= of_y[:, 5]).sum(1).mean() / 5)
    assert found.coverage.value == (between <= of_y[:, 5]).any(0).mean()


def test_blocks_of_any_size_give_the_same(monkeypatch) -> None:
    whole = neighbourhood(*_sets())
    monkeypatch.setattr(neighbours, "_BLOCK", 37)
    assert neighbourhood(*_sets()) == whole


def test_standard_errors_are_those_of_leaving_groups_out() -> None:
    x, y = _sets(80, 50)
    group = np.random.default_rng(0).permutation(80) % neighbours.NUM_GROUPS
    parts = [neighbourhood(x[group != g], y) for g in range(neighbours.NUM_GROUPS)]
    found = neighbourhood(x, y)
    for name in ("recall", "coverage"):
        left = np.array([getattr(part, name).value for part in parts])
        variance = (len(left) - 1) * left.var()
        assert getattr(found, name).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)
    share = found.precision.value
    assert found.precision.standard_error == pytest.approx(np.sqrt(share * (1 - share) / 79))


def test_a_set_is_precise_about_itself_and_a_far_one_is_not() -> None:
    x, _ = _sets()
    same, far = neighbourhood(x, x), neighbourhood(x + 100, x)
    assert (same.precision.value, same.recall.value, same.coverage.value) == (1, 1, 1)
    assert [score.value for score in far] == [0, 0, 0, 0]


def test_a_generator_that_draws_one_picture_is_precise_and_recalls_nothing() -> None:
    _, y = _sets()
    found = neighbourhood(np.tile(y[:1], (40, 1)), y)
    assert found.precision.value == 1
    assert found.recall.value == pytest.approx(1 / len(y))
    assert found.coverage.value < 0.1


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="6 pictures or more in each set, got 5 and 9"):
        neighbourhood(np.zeros((5, 2)), np.zeros((9, 2)))


def test_nearest_are_found_over_blocks() -> None:
    x, y = _sets(5, 250)
    distances, numbers = nearest(x, np.array_split(y, 7), 4)
    expected = cdist(x, y)
    np.testing.assert_array_equal(numbers, np.argsort(expected, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :4], rtol=1e-9)
    with pytest.raises(ValueError, match="k=9 nearest of 8 pictures"):
        nearest(x, [y[:8]], 9)
