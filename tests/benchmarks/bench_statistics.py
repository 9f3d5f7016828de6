"""A rehearsal of many pictures with a made-up extractor: time and memory of statistics and scores by their number.

    python tests/benchmarks/bench_statistics.py [N ...] [--dim 2048] [--works statistics fd kd recall]

For each N, features go into a store shard by shard, as an evaluation writes them. Then come, each in a process of its own whose
greatest memory is its own, the statistics from the shards and the scores that need all features. A shard is made from its number
alone. The last store is made a second time, backwards, and its statistics must be equal to the bit.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.feature_store import Contents, FeatureStore
from pipelines.frechet import frechet_estimate
from pipelines.kernels import kernel_inception_distance
from pipelines.neighbours import neighbourhood

CLASSES = 1008


def _store(folder: str, num_images: int, dim: int) -> FeatureStore:
    return FeatureStore(
        path=f"{folder}/{num_images}",
        num_images=num_images,
        dim=dim,
        num_classes=CLASSES,
        settings={},
    )


def _make(store: FeatureStore, shard: int) -> Contents:
    """Features like a network's: not negative, with a spectrum that falls."""
    rng = np.random.default_rng(shard)
    n = len(store.images(shard))
    hidden = (
        rng.normal(size=(n, 128)).astype(np.float32) / (1 + np.arange(128, dtype=np.float32)) ** 0.5
    )
    mix = np.random.default_rng(10**6).normal(size=(128, store.dim)).astype(np.float32)
    noise = rng.normal(size=(n, store.dim)).astype(np.float32)
    features = np.maximum(hidden @ mix + 0.3 * noise, 0)
    return Contents(features, rng.normal(size=(n, CLASSES)).astype(np.float32))


def _statistics(store: FeatureStore) -> dict[str, Any]:
    statistics = store.statistics()
    state = {"mean": statistics.mean, "factor": statistics.factor}
    return state | {"state_mib": statistics.factor.nbytes / 2**20}


def _interval(store: FeatureStore) -> dict[str, Any]:
    statistics = store.statistics()
    reference = dataclasses.replace(statistics, mean=statistics.mean + 0.01)
    return frechet_estimate(store.read_all().features, reference, statistics)._asdict()


def _kid(store: FeatureStore) -> dict[str, Any]:
    features = store.read_all().features
    return kernel_inception_distance(features[::2], features[1::2]).distance._asdict()


def _neighbours(store: FeatureStore) -> dict[str, Any]:
    features = store.read_all().features
    return {"recall": neighbourhood(features[::2], features[1::2]).recall.value}


WORKS = {"statistics": _statistics, "fd": _interval, "kd": _kid, "recall": _neighbours}


def _measured(
    work: Callable[[FeatureStore], dict[str, Any]], store: FeatureStore, answer: Any
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = work(store)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.send((found, seconds, before / 1024, after / 1024))


def _apart(
    work: Callable[[FeatureStore], dict[str, Any]], store: FeatureStore
) -> tuple[dict[str, Any], str]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_measured, args=(work, store, there)
    )
    process.start()
    there.close()  # else nobody would notice that the process has died
    found, seconds, before, after = here.recv()
    process.join()
    return found, f"seconds={seconds:.1f} peak_mib={after:.0f} of_which_before={before:.0f}"


def main(numbers: list[int], dim: int, works: list[str]) -> None:
    """Write one line a number of pictures and kind of work."""
    folder = tempfile.mkdtemp()
    try:
        for number in numbers:
            store = _store(folder, number, dim)
            for shard in store.missing():
                store.write(shard, _make(store, shard))
            for name in works:
                values, said = _apart(WORKS[name], store)
                told = {key: value for key, value in values.items() if np.isscalar(value)}
                sys.stdout.write(f"n={number} {name} {said} {json.dumps(told)}\n")
                sys.stdout.flush()
        again = dataclasses.replace(store, path=store.path + "-again")
        for shard in reversed(again.missing()):
            again.write(shard, _make(again, shard))
        found, other = (_apart(_statistics, made)[0] for made in (store, again))
        equal = all(np.array_equal(found[key], other[key]) for key in found)
        sys.stdout.write(f"n={number} made backwards: bit-equal statistics={equal}\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, default=[4096, 30000], metavar="N")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    options = parser.parse_args()
    main(options.numbers, options.dim, options.works)
