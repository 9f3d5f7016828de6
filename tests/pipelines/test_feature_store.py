"""A store of features gives back what was written, piece by piece, and takes nothing that is not its own."""

import dataclasses
import tracemalloc
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import feature_store
from pipelines.errors import UserError
from pipelines.feature_store import Contents, FeatureStore
from pipelines.metrics import FeatureStatistics


@pytest.fixture
def store(tmp_path, monkeypatch) -> FeatureStore:
    monkeypatch.setattr(feature_store, "SHARD_IMAGES", 8)
    settings = {"extractor": "one", "sizes": (16, 16)}
    return FeatureStore(
        path=str(tmp_path / "features"), num_images=20, dim=5, num_classes=3, settings=settings
    )


def _made(store: FeatureStore, shard: int) -> Contents:
    rng = np.random.default_rng(shard)
    n = len(store.images(shard))
    return Contents(
        rng.normal(size=(n, store.dim)).astype(np.float32),
        rng.normal(size=(n, store.num_classes)).astype(np.float32) if store.num_classes else None,
    )


def _fill(store: FeatureStore, shards=None) -> None:
    for shard in store.missing() if shards is None else shards:
        store.write(shard, _made(store, shard))


def test_what_was_written_in_any_order_is_read_in_that_of_the_pictures(store) -> None:
    assert store.missing() == [0, 1, 2]
    _fill(store, [2, 0])
    assert store.missing() == [1]
    _fill(store)
    assert store.missing() == []
    made = Contents.join([_made(store, shard) for shard in range(3)])
    read = store.read_all()
    np.testing.assert_array_equal(read.features, made.features)
    np.testing.assert_array_equal(read.logits, made.logits)
    assert [len(store.images(shard)) for shard in range(3)] == [8, 8, 4]


def test_shards_are_the_same_bytes_whoever_makes_them(store, tmp_path) -> None:
    again = dataclasses.replace(store, path=str(tmp_path / "again"))
    _fill(store)
    _fill(again, [1, 0, 2, 1])
    names = [path.name for path in sorted(Path(store.path).iterdir())]
    assert names == ["00000.parquet", "00001.parquet", "00002.parquet"]
    for name in names:
        assert Path(store.path, name).read_bytes() == Path(again.path, name).read_bytes()
    assert again.statistics().factor.tobytes() == store.statistics().factor.tobytes()


def test_statistics_are_those_of_all_features(store) -> None:
    _fill(store)
    whole = FeatureStatistics.from_features(store.read_all().features)
    np.testing.assert_allclose(store.statistics().covariance(), whole.covariance(), rtol=1e-12)
    assert store.statistics().count == 20


def test_extractors_without_classes_have_no_logits(store) -> None:
    plain = dataclasses.replace(store, num_classes=0)
    _fill(plain)
    assert plain.read_all().logits is None


def test_duckdb_reads_it(store) -> None:
    _fill(store)
    rows = duckdb.sql(
        f"select index, features[1], len(logits) from '{store.path}/*.parquet' order by index"
    ).fetchall()
    assert [row[0] for row in rows] == list(range(20))
    assert rows[0][1] == _made(store, 0).features[0, 0]
    assert {row[2] for row in rows} == {3}


def test_features_of_other_settings_are_refused_by_name(store) -> None:
    _fill(store)
    other = dataclasses.replace(store, settings={"extractor": "two"}, dim=4)
    with pytest.raises(UserError, match=r"00001.parquet: holds features of other dim, settings"):
        other.read(1)


def test_a_damaged_shard_is_named(store) -> None:
    _fill(store)
    path = Path(store.file(1))
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    content[column.data_page_offset + column.total_compressed_size - 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001.parquet: cannot be read.*delete it"):
        store.read(1)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"00001.parquet: cannot be read"):
        store.statistics()


def test_a_shard_in_anothers_place_is_refused(store) -> None:
    _fill(store)
    Path(store.file(0)).write_bytes(Path(store.file(1)).read_bytes())
    with pytest.raises(UserError, match=r"00000.parquet: does not hold pictures 0 to 7"):
        store.read(0)


def test_what_is_not_finite_or_of_another_shape_is_not_written(store) -> None:
    made = _made(store, 0)
    made.features[3, 2] = np.nan
    with pytest.raises(ValueError, match="features of picture 3 are not finite"):
        store.write(0, made)
    with pytest.raises(
        ValueError, match=r"features of shard 2 must have shape \(4, 5\), not \(8, 5\)"
    ):
        store.write(2, _made(store, 0))
    with pytest.raises(ValueError, match=r"logits of shard 1 must have shape \(8, 3\), not None"):
        store.write(1, Contents(_made(store, 1).features, None))
    assert store.missing() == [0, 1, 2]


def test_statistics_take_the_same_memory_whatever_the_number_of_pictures(store) -> None:
    peaks = []
    for number in (200, 1000):  # both more than twice the features
        large = dataclasses.replace(
            store, path=f"{store.path}-{number}", num_images=number, dim=64, num_classes=0
        )
        _fill(large)
        tracemalloc.start()
        large.statistics()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
