"""The Frechet distance beside `scipy.linalg.sqrtm`, and the Inception network beside torch-fidelity's, in one run.

Distances are of two sets of made-up features whose covariances are well or ill conditioned, or singular because there are
fewer pictures than features. Both methods start from the statistics that each keeps: ours a factor of the scatter, sqrtm mean
and covariance. The reference comes from neither: with the singular value decomposition U S V^T of each set's centred features,
the trace of (C_a C_b)^(1/2) is the sum of singular values of S_a V_a^T V_b S_b over sqrt((n_a - 1)(n_b - 1)), and no covariance
is formed.

Extractors get the same pictures and weights (random, in the file format of the published ones) and as many threads;
torch-fidelity's runs in an interpreter of its own, which `--oracle-python` names, round by round in turn with ours
(`costs.rounds`). Without that option ours is measured alone.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy import ndarray

from layered_model.features import load_extractor
from layered_model.inception import Inception
from pipelines import cli, costs
from pipelines.config import UserError
from pipelines.metrics import FeatureStatistics, frechet_distance
from pipelines.session import event

logger = logging.getLogger(__name__)

RIVAL = Path(__file__).with_name("fidelity_speed.py")
SIDE = 128
"""Pixels of the pictures."""
OURS, THEIRS = "layered", "torch-fidelity"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    dimension: int
    "Features of a picture; 0 leaves the distances out."
    num_images: int
    "Of a round of the extractors; 0 leaves them out."
    batch_size: int
    threads: int
    repeats: int
    "Rounds that count."
    oracle_python: str | None
    "Interpreter that has torch-fidelity."

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        for name in ("dimension", "num_images"):
            if (value := getattr(self, name)) < 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must not be negative")
        if self.oracle_python is not None and not os.access(self.oracle_python, os.X_OK):
            raise UserError(f"--oracle-python {self.oracle_python} is no interpreter")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Two sets of features."""

    name: str
    ratio: float
    "Pictures a feature."
    decades: float
    "Over which the deviations of the features' directions fall evenly."


CASES = (
    Case(name="well conditioned", ratio=3, decades=1),
    Case(name="ill conditioned", ratio=3, decades=6),
    Case(name="nearly singular", ratio=1.1, decades=4),
    Case(name="singular", ratio=0.5, decades=4),
    Case(name="a demo's", ratio=1 / 16, decades=4),
)


def run(settings: Settings, output: str | None = None) -> dict[str, Any]:
    """Measures, prints tables, and returns and writes everything.

    Raises:
        UserError: the interpreter named has no torch-fidelity.
    """
    torch.set_num_threads(settings.threads)
    result: dict[str, Any] = {"settings": asdict(settings), "processor": costs.processor()}
    if settings.dimension:
        sys.stdout.write(f"Frechet distance of {settings.dimension} features\n{_HEAD}\n")
        result["distances"] = {}
        for case in CASES:
            figures = distance(case, settings)
            result["distances"][case.name] = figures
            sys.stdout.write(_line(case, figures) + "\n")
            sys.stdout.flush()
    if settings.num_images:
        speeds = extractor_speeds(settings)
        result["extractors"] = speeds
        sys.stdout.write(_speeds(speeds, settings) + "\n")
    if output is not None:
        Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def distance(case: Case, settings: Settings) -> dict[str, Any]:
    """Seconds of both methods, round by round, and their errors relative to the reference."""
    x, y = (
        features(case, settings.dimension, seed) * scale for seed, scale in ((1, 1.0), (2, 1.1))
    )
    own = [FeatureStatistics.from_features(z) for z in (x, y)]
    moments = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    exact = reference_distance(x, y)
    found: dict[str, float] = {}

    def keep(name: str, function: Callable[[], float]) -> Callable[[], None]:
        def job() -> None:
            found[name] = function()

        return job

    jobs = {
        "ours": keep("ours", lambda: frechet_distance(*own)),
        "sqrtm": keep("sqrtm", lambda: sqrtm_distance(*moments)),
    }
    seconds = costs.rounds(jobs, repeats=settings.repeats, warm_up=0, synchronize=lambda: None)
    return {
        "num_images": len(x),
        "distance": exact,
        "seconds": seconds,
        "ratio": asdict(costs.ratio(seconds["ours"], seconds["sqrtm"])),
        "error": {name: abs(value / exact - 1) for name, value in found.items()},
    }


def features(case: Case, dimension: int, seed: int) -> Float[ndarray, "n d"]:
    """Gaussian features of a random basis with deviations from 1 down, and a mean that depends on the seed."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dimension, dimension)))[0]
    deviations = np.logspace(0, -case.decades, dimension)
    count = max(2, round(case.ratio * dimension))
    mean = 0.01 * rng.normal(size=dimension)
    found: ndarray = (rng.normal(size=(count, dimension)) * deviations) @ basis + mean
    return found


def reference_distance(x: Float[ndarray, "n d"], y: Float[ndarray, "m d"]) -> float:
    """Squared Frechet distance by singular value decompositions alone."""
    roots = []
    for z in (x, y):
        _, values, directions = scipy.linalg.svd(z - z.mean(0), full_matrices=False)
        roots.append(values[:, None] * directions / np.sqrt(len(z) - 1))
    a, b = roots
    delta = x.mean(0) - y.mean(0)
    return float(
        delta @ delta + (a * a).sum() + (b * b).sum() - 2 * scipy.linalg.svdvals(a @ b.T).sum()
    )


Moments = tuple[Float[ndarray, " d"], Float[ndarray, "d d"]]


def sqrtm_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance with a matrix square root, as pytorch-fid has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Matrix is singular": that is the point
        root = scipy.linalg.sqrtm(a[1] @ b[1])
    delta = a[0] - b[0]
    return float(delta @ delta + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root).real)


def extractor_speeds(settings: Settings) -> dict[str, list[float]]:
    """Images/s of each extractor, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "random.pth")
        torch.manual_seed(0)
        torch.save(Inception().state_dict(), weights)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        extractor = load_extractor("inception", weights=weights, sha256=digest)
        generator = torch.Generator().manual_seed(0)
        shape = (settings.num_images, SIDE, SIDE, 3)
        pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)

        def ours() -> None:
            for batch in pictures.split(settings.batch_size):  # type: ignore[no-untyped-call]
                extractor(batch)

        jobs: dict[str, costs.Job] = {OURS: ours}
        if settings.oracle_python is None:
            return _images_per_second(jobs, settings)
        with _rival(settings, weights) as theirs:
            return _images_per_second(jobs | {THEIRS: theirs}, settings)


def _images_per_second(jobs: dict[str, costs.Job], settings: Settings) -> dict[str, list[float]]:
    seconds = costs.rounds(jobs, repeats=settings.repeats, warm_up=1, synchronize=lambda: None)
    return {name: [settings.num_images / s for s in taken] for name, taken in seconds.items()}


@contextmanager
def _rival(settings: Settings, weights: Path) -> Iterator[costs.Job]:
    """A round of torch-fidelity's extractor, in a process that waits between rounds."""
    assert settings.oracle_python is not None
    sizes = (settings.num_images, settings.batch_size, settings.threads, SIDE)
    # -I: what is beside the script is not for it to import.
    command = [settings.oracle_python, "-I", RIVAL, weights, *sizes]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # which ends when its input does
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answer = process.stdin, process.stdout
        if answer.readline() != "ready\n":
            raise UserError(
                f"--oracle-python {settings.oracle_python} does not run torch-fidelity; `make oracles` makes one that does"
            )
        event(logger, "started", extractor=THEIRS)

        def job() -> None:
            ask.write("\n")
            ask.flush()
            if answer.readline() != "done\n":
                raise RuntimeError("torch-fidelity's process ended")

        yield job


_HEAD = (
    f"  {'covariances':18}{'pictures':>9}{'ours s':>9}{'sqrtm s':>9}{'ratio':>8}"
    f"{'our error':>11}{'its error':>11}"
)


def _line(case: Case, figures: dict[str, Any]) -> str:
    ours, sqrtm = (costs.Spread.of(figures["seconds"][name]).median for name in ("ours", "sqrtm"))
    error = figures["error"]
    return (
        f"  {case.name:18}{figures['num_images']:9}{ours:9.3f}{sqrtm:9.2f}"
        f"{figures['ratio']['median']:8.3f}{error['ours']:11.1e}{error['sqrtm']:11.1e}"
    )


def _speeds(speeds: dict[str, list[float]], settings: Settings) -> str:
    lines = [
        f"Inception, {SIDE} px, batches of {settings.batch_size}, {settings.threads} threads, "
        f"{costs.processor()}; images/s, median (quartiles) of {settings.repeats} rounds"
    ]
    for name, values in speeds.items():
        spread = costs.Spread.of(values)
        lines.append(f"  {name:18}{spread.median:7.2f} ({spread.low:.2f}-{spread.high:.2f})")
    if THEIRS in speeds:
        ratio = costs.ratio(speeds[OURS], speeds[THEIRS])
        lines.append(f"  {'ratio':18}{ratio.median:7.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """``layered bench fid``."""
    return cli.main(["bench", "fid", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
