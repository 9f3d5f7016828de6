"""Statistics as pytorch-fid and clean-fid keep them, and those that say who made them."""

import dataclasses
import json

import numpy as np
import pytest

from layered_model.features import FeatureExtractor
from pipelines import statistics_files
from pipelines.errors import UserError
from pipelines.metrics import FeatureStatistics, frechet_distance

EXTRACTOR = FeatureExtractor(
    name="inception",
    prefix="",
    dim=6,
    num_classes=3,
    preprocess="bilinear to 299",
    weights_sha256="abc",
    network=lambda x: (x, x),
    prepare=lambda x: x,
)


@pytest.fixture
def features() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 1


def test_our_file_comes_back_and_names_its_maker(features, tmp_path) -> None:
    path, statistics = str(tmp_path / "a.npz"), FeatureStatistics.from_features(features)
    statistics_files.save(path, statistics, EXTRACTOR, pictures="some")
    found = statistics_files.load(path, EXTRACTOR)
    assert (found.num_images, found.features, found.warnings) == (40, None, ())
    assert found.about["pictures"] == "some"
    assert found.statistics.count == 40
    np.testing.assert_allclose(found.statistics.covariance(), np.cov(features.T), rtol=1e-12)
    assert frechet_distance(found.statistics, statistics) == pytest.approx(0, abs=1e-10)
    again = statistics_files.load(path, EXTRACTOR).statistics
    assert again.factor.tobytes() == found.statistics.factor.tobytes()


def test_our_file_is_what_pytorch_fid_and_clean_fid_read(features, tmp_path) -> None:
    """Both take ``mu`` and ``sigma`` of an npz, without a pickle."""
    path = str(tmp_path / "a.npz")
    statistics_files.save(path, FeatureStatistics.from_features(features), EXTRACTOR)
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], features.mean(0))
        np.testing.assert_allclose(file["sigma"], np.cov(features, rowvar=False))
        assert json.loads(str(file["about"]))["extractor_sha256"] == "abc"


def test_pytorch_fids_file_is_read_with_a_warning(features, tmp_path) -> None:
    path = str(tmp_path / "cifar.npz")
    np.savez_compressed(path, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    found = statistics_files.load(path, EXTRACTOR)
    assert found.num_images is None
    assert "does not say what made it" in found.warnings[0]
    other = FeatureStatistics.from_features(features * 1.3)
    expected = frechet_distance(FeatureStatistics.from_features(features), other)
    assert frechet_distance(found.statistics, other) == pytest.approx(expected, rel=1e-9)


def test_clean_fids_features_are_read(features, tmp_path) -> None:
    path = str(tmp_path / "mine_legacy_tensorflow_custom_na_kid.npz")
    np.savez_compressed(path, feats=features)
    found = statistics_files.load(path, EXTRACTOR)
    np.testing.assert_array_equal(found.features, features)
    assert (found.num_images, found.warnings) == (40, ())


def test_our_features_come_back(features, tmp_path) -> None:
    path = str(tmp_path / "a_kid.npz")
    statistics_files.save_features(path, features, EXTRACTOR)
    np.testing.assert_array_equal(statistics_files.load(path, EXTRACTOR).features, features)


@pytest.mark.parametrize(
    "name",
    [
        "ffhq_clean_trainval70k_1024.npz",
        "mine_legacy_pytorch_custom_na.npz",
        "mine_legacy_tensorflow_clip_vit_b_32_custom_na.npz",
    ],
)
def test_clean_fids_statistics_of_another_resize_are_refused_by_name(features, tmp_path, name):
    np.savez(tmp_path / name, mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    with pytest.raises(UserError, match=r"another resize moves FID"):
        statistics_files.load(str(tmp_path / name), EXTRACTOR)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "lite0", "extractor='inception'.*'lite0'"),
        ("weights_sha256", "def", "extractor_sha256='abc'.*'def'"),
        ("preprocess", "bicubic", "preprocess='bilinear to 299'.*'bicubic'"),
    ],
)
def test_another_extractors_file_is_refused(features, tmp_path, field, value, said) -> None:
    path = str(tmp_path / "a.npz")
    statistics_files.save(path, FeatureStatistics.from_features(features), EXTRACTOR)
    with pytest.raises(UserError, match=said):
        statistics_files.load(path, dataclasses.replace(EXTRACTOR, **{field: value}))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"mu has shape \(4,\).*6 features of inception"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"sigma has shape \(5, 5\)"),
        ({"feats": np.zeros((9, 4))}, r"feats has shape \(9, 4\).*need \('n', 6\)"),
        ({"other": np.zeros(6)}, "holds other; statistics are 'mu' and 'sigma', or 'feats'"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "mu must be finite"),
        ({"mu": np.zeros(6), "sigma": -np.eye(6)}, "sigma is no covariance"),
        ({"mu": np.zeros(6), "sigma": np.triu(np.ones((6, 6)))}, "sigma is no covariance"),
    ],
)
def test_what_are_no_statistics_of_the_extractor_is_refused(tmp_path, arrays, said) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=said):
        statistics_files.load(str(tmp_path / "a.npz"), EXTRACTOR)


def test_a_missing_or_damaged_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no\.npz: cannot be read as statistics"):
        statistics_files.load(str(tmp_path / "no.npz"), EXTRACTOR)
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"bad\.npz: cannot be read as statistics"):
        statistics_files.load(str(tmp_path / "bad.npz"), EXTRACTOR)
    (tmp_path / "text.npz").write_bytes(b"text")
    with pytest.raises(UserError, match=r"text\.npz: cannot be read as statistics"):
        statistics_files.load(str(tmp_path / "text.npz"), EXTRACTOR)
