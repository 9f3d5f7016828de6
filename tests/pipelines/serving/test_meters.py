"""What Prometheus is told."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.serving.meters import Meters, Tally
from pipelines.serving.orders import Work


def test_a_tally_counts_values_up_to_each_bound():
    tally = Tally((1, 2, 4))
    for value in (0.5, 1.0, 1.5, 4.0, 9.0):
        tally.add(value)
    found = tally.distribution()
    assert found.counts == (2, 1, 1, 1)
    assert found.total == pytest.approx(16.0)


def test_engines_are_told_apart_and_can_be_parsed():
    tally = Tally((1, 2))
    for value in (1, 2, 2, 5):
        tally.add(value)
    work = [
        Work(
            replica=name,
            active=active,
            waiting=1,
            rows=tally.distribution(),
            seconds=tally.distribution(),
        )
        for name, active in (("a", 3), ("b", 4))
    ]
    meters = Meters()
    meters.requests.labels("/v1/models", "200").inc()
    families = {f.name: f for f in text_string_to_metric_families(meters.exposition(work).decode())}
    active = {s.labels["replica"]: s.value for s in families["layered_active_pictures"].samples}
    assert active == {"a": 3, "b": 4}
    rows = families["layered_pass_rows"]
    buckets = [
        (s.labels["le"], s.value)
        for s in rows.samples
        if s.name.endswith("_bucket") and s.labels["replica"] == "a"
    ]
    assert buckets == [("1.0", 1), ("2.0", 3), ("+Inf", 4)]
    sums = {s.name: s.value for s in rows.samples if s.labels["replica"] == "b"}
    assert sums["layered_pass_rows_sum"] == 10
    assert sums["layered_pass_rows_count"] == 4
    assert families["layered_requests"].samples[0].value == 1
