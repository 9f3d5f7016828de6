"""The benchmark of the scores: a distance that is exact, a reference that is independent, and figures of all."""

import json
import sys

import numpy as np
import pytest

from pipelines import bench_fid, cli
from pipelines.bench_fid import CASES, Case
from pipelines.metrics import FeatureStatistics, frechet_distance


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_distance_is_the_references(case: Case) -> None:
    """Where the matrix square root of the covariances is not."""
    x, y = (bench_fid.features(case, 96, seed) for seed in (1, 2))
    found = frechet_distance(*map(FeatureStatistics.from_features, (x, y)))
    assert found == pytest.approx(bench_fid.reference_distance(x, y), rel=1e-11)


def test_the_reference_of_gaussians_along_the_axes_is_known() -> None:
    """Covariances that commute: the distance is that of the deviations, direction by direction."""
    x = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0]])
    y = np.array([[0.5, 0, 0], [-0.5, 0, 0], [0, 0, 3], [0, 0, -3]]) + 1
    deviations = np.sqrt(np.array([[2, 8, 0], [0.5, 0, 18]]) / 3)
    expected = 3 + np.square(deviations[0] - deviations[1]).sum()
    assert bench_fid.reference_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_figures_of_both_methods_are_reported(tmp_path, capsys) -> None:
    output = tmp_path / "bench.json"
    arguments = ["--dimension", "32", "--num-images", "2", "--repeats", "1", "--threads", "1"]
    assert cli.main(["bench", "fid", *arguments, "--output", str(output)]) == 0
    shown, result = capsys.readouterr().out, json.loads(output.read_text())
    assert "ill conditioned" in shown
    assert "images/s" in shown
    for figures in result["distances"].values():
        assert figures["error"]["ours"] < 1e-9
        assert min(figures["seconds"]["ours"] + figures["seconds"]["sqrtm"]) > 0
    assert list(result["extractors"]) == ["layered"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--num-images", "-1"], "--num-images -1 must not be negative"),
        (["--oracle-python", "nowhere"], "--oracle-python nowhere is no interpreter"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(["bench", "fid", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_without_torch_fidelity_is_named(capsys) -> None:
    arguments = ["--dimension", "0", "--num-images", "1", "--oracle-python", sys.executable]
    assert cli.main(["bench", "fid", *arguments]) == 2
    assert "does not run torch-fidelity; `make oracles`" in capsys.readouterr().err
