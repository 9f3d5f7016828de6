"""What is measured while serving, for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

Requests and pictures are counted where they are answered; what the engines do comes from `Painter.work`, with a label for each.
Called by `api` and `guard`; `Tally` by `painter`.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pipelines.serving.orders import Distribution, Work

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PICTURE_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
PASS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
PASS_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Tally:
    """Counts values by size; from any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Counts one."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value

    def distribution(self) -> Distribution:
        """All so far."""
        with self._lock:
            return Distribution(self._bounds, tuple(self._counts), self._total)


class Meters:
    """What one interface counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "layered_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self.pictures = Histogram(
            "layered_picture_seconds",
            "From the acceptance of a picture to its end.",
            ["size"],
            buckets=PICTURE_SECONDS,
            registry=self._registry,
        )
        self.previews = Histogram(
            "layered_first_preview_seconds",
            "From the acceptance of a picture to its first preview.",
            ["size"],
            buckets=PICTURE_SECONDS,
            registry=self._registry,
        )

    def exposition(self, work: Iterable[Work]) -> bytes:
        """Everything in Prometheus' text format.

        Args:
            work: Of all engines.
        """
        engines = CollectorRegistry()
        engines.register(_Engines(list(work)))
        return generate_latest(self._registry) + generate_latest(engines)


class _Engines(Collector):
    """Engines' work as metrics."""

    def __init__(self, work: Sequence[Work]) -> None:
        self._work = work

    def collect(self) -> Iterator[Metric]:
        labels = ["replica"]
        gauges = {
            "active": GaugeMetricFamily(
                "layered_active_pictures", "Pictures on their way.", labels=labels
            ),
            "waiting": GaugeMetricFamily(
                "layered_waiting_pictures", "Pictures that wait for a place.", labels=labels
            ),
        }
        histograms = {
            "rows": HistogramMetricFamily(
                "layered_pass_rows", "Rows of a pass of the network.", labels=labels
            ),
            "seconds": HistogramMetricFamily(
                "layered_pass_seconds", "Of a pass of the network.", labels=labels
            ),
        }
        for work in self._work:
            for name, gauge in gauges.items():
                gauge.add_metric([work.replica], getattr(work, name))
            for name, histogram in histograms.items():
                found: Distribution = getattr(work, name)
                histogram.add_metric([work.replica], _cumulative(found), found.total)
        yield from gauges.values()
        yield from histograms.values()


def _cumulative(found: Distribution) -> list[tuple[str, float]]:
    """Prometheus counts values up to each bound."""
    bounds = [*(f"{float(bound)}" for bound in found.bounds), "+Inf"]
    sums = [sum(found.counts[: i + 1]) for i in range(len(bounds))]
    return list(zip(bounds, map(float, sums), strict=True))
