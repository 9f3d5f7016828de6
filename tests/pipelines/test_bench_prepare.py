"""The benchmark of prepare: what it measures, and what it refuses."""

import json
import math
import sys

import pytest

from pipelines import bench_prepare, cli, generated
from pipelines.config import load_config

EATER = "import sys, time; held = bytearray(int(sys.argv[1]) * 2**20); time.sleep(1.5)"


def test_memory_is_that_of_the_driver_and_of_rays_workers_below_it() -> None:
    script = f"""
import subprocess, time
held = bytearray(100 * 2**20)
eat = {[sys.executable, "-c", EATER]!r}
workers = [subprocess.Popen(["ray::" + name, *eat[1:], size], executable=eat[0]) for name, size in (("a", "30"), ("b", "60"))]
other = subprocess.Popen([*eat, "300"])
for process in (*workers, other):
    process.wait()
"""
    with bench_prepare._watched([sys.executable, "-c", script]) as (process, memory):
        assert process.wait() == 0
    megabytes = [memory.driver / 2**20, memory.worker / 2**20, memory.workers / 2**20]
    for found, held in zip(megabytes, (100, 60, 90), strict=True):
        assert held < found < held + 60


@pytest.mark.ray
@pytest.mark.soak
def test_measures_a_run(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(bench_prepare, "ROWS_PER_FILE", {False: 4})
    output = tmp_path / "bench.json"
    arguments = ["--num-images", "12", "--text-images", "0", "--output", str(output)]
    settings = ["model.resolutions=[16,32,64]", "ray.num_cpus=2"]
    assert cli.main(["bench", "prepare", *arguments, *settings]) == 0
    assert "coco512, model.resolutions=[16,32,64], " in capsys.readouterr().out
    (run,) = json.loads(output.read_text())["runs"]
    assert (run["num_images"], run["text"]) == (12, False)
    assert 0 < run["whole"] < run["alone"]
    assert math.isfinite(run["steady"])
    memory = run["memory"]
    assert 0 < memory["worker"] <= memory["workers"]
    assert memory["driver"] > 50 * 2**20


@pytest.mark.slow
def test_measures_the_encoder_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_prepare, "CORES", 1)
    encoder = tmp_path / "encoder"
    generated.encoder(encoder, 16)
    captions, pictures = generated.coco(tmp_path, 3)
    overrides = bench_prepare._overrides(captions, pictures, str(encoder))
    config = load_config(bench_prepare.PRESET, overrides)
    assert config.model.text_width == 16
    assert bench_prepare._encoding(config) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "5", "0"], "--num-images 0 must be at least 1"),
        (["--text-images", "-1"], "--text-images -1 must not be negative"),
        (["data.image_quality=0"], "data.image_quality=0 must be from 1 to 100"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(["bench", "prepare", *arguments]) == 2
    assert message in capsys.readouterr().err
