"""What training does when something goes wrong: it goes on, or stops and says from where it can go on."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from layered_model import LayeredPipeline
from layered_model.diffusion import LayeredDiffusion
from pipelines import cli, prepare, train, trainer
from pipelines.checkpoints import STATE_FILE
from pipelines.config import UserError, to_yaml
from pipelines.dataset import PreparedDataset
from pipelines.errors import StageFailed
from pipelines.loader import Share, batches
from pipelines.recipe import fresh_network
from tests.pipelines.conftest import SMALL_MODEL

TINY = (
    *SMALL_MODEL,
    "model.dropout=0.1",
    "train.num_images=48",
    "train.batch_size=8",
    "train.num_workers=1",
    "train.log_every_images=8",
    "train.checkpoint_every_images=16",
    "train.num_checkpoints_kept=2",
    "train.grid_every_images=1000",
    "train.num_validation_images=3",
    "train.validate_every_images=16",
    "train.warmup_images=16",
    "train.cooldown_images=0",
    "train.max_skipped_steps=0",
)


@pytest.fixture
def config(configure, without_ray, tmp_path):
    config = configure(*TINY, f"run={json.dumps(str(tmp_path / 'run'))}")
    prepare.run(config)
    return config


def changed(config, run=None, **settings):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    return config if run is None else dataclasses.replace(config, run=str(run))


def model_of(config) -> str:
    return LayeredPipeline.from_pretrained(f"{config.run}/model").weights_sha256


def lines_of(config) -> list[dict]:
    return [json.loads(line) for line in Path(config.run, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained_once() -> list:
    """Where `whole` keeps its run for the next test."""
    return []


@pytest.fixture
def whole(config, local_ray, tmp_path, trained_once):
    """Configuration of a run that nothing befell."""
    if not trained_once:
        run = changed(config, run=tmp_path / "whole", keep_checkpoints_every_images=48)
        train.run(run)
        trained_once.append(run)
    return trained_once[0]


@pytest.fixture
def spoil(monkeypatch):
    """Lets something go wrong in the steps after so many pictures."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def run_worker(what, after, arguments):
        def backward(self, batch):
            terms = original(self, batch)
            if self.num_images in after:
                if what == "nan":
                    next(self.network.parameters()).grad.fill_(math.nan)
                elif what == "memory":
                    torch.empty(2**50)
                elif what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
            return terms

        original = trainer.Worker._backward
        trainer.Worker._backward = backward
        return trainer.run_worker(arguments)

    def spoil(what: str, *after: int) -> None:
        spoilt = functools.partial(run_worker, what, after)
        monkeypatch.setattr("pipelines.trainer.run_worker", spoilt)

    yield spoil
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("memory", "can't allocate memory.*; less memory is needed with a higher train.accum"),
        ("kill", "ActorDiedError"),
    ],
)
def test_what_ends_training_is_told_in_a_line(config, local_ray, spoil, what, told) -> None:
    spoil(what, 24)
    with pytest.raises(StageFailed) as caught:
        train.run(changed(config, max_failures=0))
    assert re.match(
        "training failed, and train.max_failures=0 allows no new start: "
        rf".*{told}.*; the last checkpoint is {config.run}/checkpoints/000000000016, from which "
        "the same command goes on$",
        str(caught.value),
    ), caught.value


@pytest.mark.ray
@pytest.mark.slow
def test_steps_without_a_finite_gradient_are_left_out_and_too_many_stop_training(
    config, local_ray, spoil
) -> None:
    spoil("nan", 8, 24, 32)
    with pytest.raises(UserError) as caught:
        train.run(changed(config, max_skipped_steps=2))
    message = str(caught.value)
    assert "3 steps had a gradient that is not finite, the last after 32 pictures" in message
    assert f"the last checkpoint is {config.run}/checkpoints/000000000032" in message
    assert "train.max_skipped_steps=2 allows no more" in message
    assert not Path(config.run, "model").exists()
    train.run(changed(config, max_skipped_steps=3))
    assert [line["skipped_steps"] for line in lines_of(config)] == [0, 1, 1, 2, 3, 3]
    weights = LayeredPipeline.from_pretrained(f"{config.run}/model").network.state_dict()
    assert all(weight.isfinite().all() for weight in weights.values())
    losses = [line["loss/32"] for line in lines_of(config) if "loss/32" in line]
    assert len(losses) == 3  # of steps that count
    assert np.isfinite(losses).all()


def test_parts_of_a_step_add_up(config) -> None:
    """The gradients of a batch are those of its parts, whatever their number."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    share = Share(seed=0, batch_size=8, text_dropout=0.1)
    with contextlib.closing(
        batches(PreparedDataset.open(config.dataset), "train", share)
    ) as stream:
        batch = next(stream)
    gradients = []
    for num_parts in (1, 4):
        torch.manual_seed(0)
        network = fresh_network(config)
        for parameter in network.parameters():
            if not parameter.any():  # else most gradients are zero
                torch.nn.init.normal_(parameter, std=0.1)
        worker = SimpleNamespace(
            config=changed(config, accumulation_steps=num_parts),
            device=torch.device("cpu"),
            num_images=0,
            rank=0,
            model=network,
            step_model=network,
            diffusion=LayeredDiffusion(config.diffusion, config.model.layers),
        )
        trainer.Worker._backward(worker, batch)
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.ray
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(config, whole, tmp_path, capsys) -> None:
    config = changed(config, keep_checkpoints_every_images=48)
    kept = sorted(path.name for path in Path(whole.run, "checkpoints").iterdir())
    assert kept == ["000000000032", "000000000048"]
    assert {"val/loss", "val/loss/32", "memory/process_bytes", "time/checkpoint"} <= set(
        lines_of(whole)[1]
    )
    environment = json.loads(Path(whole.run, "environment.json").read_text())
    assert environment["packages"]["torch"]

    train.run(changed(config, num_images=32))
    state = Path(config.run, "checkpoints/000000000032", STATE_FILE)
    content = bytearray(state.read_bytes())
    content[1000] ^= 1
    state.write_bytes(content)
    train.run(config)
    assert model_of(config) == model_of(whole)
    assert [line["loss/32"] for line in lines_of(config)] == [
        line["loss/32"] for line in lines_of(whole)
    ]

    # The checkpoint at the end is the model, and so is the one that was cut short by hand.
    assert cli.main(["export", whole.run, "--output", str(tmp_path / "exported")]) == 0
    assert LayeredPipeline.from_pretrained(tmp_path / "exported").weights_sha256 == model_of(whole)
    early = ["export", whole.run, "--num-images", "32", "--output", str(tmp_path / "early")]
    assert cli.main(early) == 0
    assert LayeredPipeline.from_pretrained(tmp_path / "early").config.num_images_trained == 32
    assert cli.main(["export", whole.run, "--num-images", "7"]) == 2
    assert "has no such checkpoint; those are 32, 48" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_stops_training_and_the_same_command_goes_on(config, whole, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str, *more: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{''.join(more)}", "tmpfs", str(disk)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount("1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    try:
        small = changed(config, run=disk / "run")
        with pytest.raises(UserError, match=r"No space left on device; training stopped after"):
            train.run(small)
        mount("200m", ",remount")
        train.run(small)
        assert model_of(small) == model_of(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _wait_for(condition, alive) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.parametrize(("num_kills", "num_images"), [(1, 384), (5, 960)])
def test_killed_workers_change_nothing(
    config, local_ray, tmp_path, descendants, kill, num_kills, num_images
) -> None:
    """Any of two workers, at random moments, once or several times in one run."""
    settings = {
        "num_images": num_images,
        "num_workers": 2,
        "checkpoint_every_images": 48,
        "log_every_images": 16,
        "validate_every_images": 480,
    }
    whole = changed(config, run=tmp_path / "whole", **settings)
    train.run(whole)
    moments = random.Random(int(os.environ.get("TEST_SEED", "0")))
    killed = changed(config, **settings, max_failures=num_kills)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            train.run(killed)
        except BaseException as error:
            errors.append(error)

    stage = threading.Thread(target=run)
    stage.start()

    def seen() -> int:
        with contextlib.suppress(FileNotFoundError, IndexError):
            return int(lines_of(killed)[-1]["images"])
        return 0

    for least in sorted(moments.sample(range(48, num_images - 260), num_kills)):
        _wait_for(lambda least=least: seen() >= least, stage.is_alive)
        workers = [p for p, line in descendants(os.getpid()).items() if "RayTrainWorker" in line]
        kill(moments.choice(workers))
        _wait_for(lambda least=least: seen() < least or seen() > least + 96, stage.is_alive)
    stage.join()
    assert not errors
    assert model_of(killed) == model_of(whole)


RUN = """
import sys
from pipelines import session, train
from pipelines.config import from_yaml

# Without the dashboard, which takes its time to start.
train.connect = lambda config, needs, dashboard: session.connect(config, needs)
train.run(from_yaml(open(sys.argv[1]).read()))
"""


@pytest.mark.ray
@pytest.mark.soak
def test_killed_with_its_ray_training_goes_on_where_it_was(
    config, tmp_path, descendants, kill
) -> None:
    """The driver by SIGKILL, and everything else by SIGTERM, as `ray stop` does; each has a Ray of its own."""
    settings = {
        "num_images": 1600,
        "checkpoint_every_images": 48,
        "log_every_images": 80,
        "validate_every_images": 800,
    }
    whole = changed(config, run=tmp_path / "whole", **settings)
    killed = changed(config, **settings)
    (tmp_path / "whole.yaml").write_text(to_yaml(whole))
    (tmp_path / "killed.yaml").write_text(to_yaml(killed))

    @contextlib.contextmanager
    def running(name: str):
        folder = tempfile.mkdtemp(prefix="k-", dir="/tmp")  # for Ray's sockets
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / f"{name}.yaml")],
            env=os.environ | {"TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            kill(*descendants(process.pid), process.pid)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)

    def checkpoints() -> list[str]:
        folder = Path(killed.run, "checkpoints")
        return sorted(path.parent.name for path in folder.glob("*/about.json"))

    with running("whole") as process:
        assert process.wait(180) == 0
    for ended in ("driver", "ray"):
        before = checkpoints()
        with running("killed") as process:
            _wait_for(
                lambda before=before: len(set(checkpoints()) - set(before)) >= 2,
                lambda process=process: process.poll() is None,
            )
            family = descendants(process.pid)
            if ended == "driver":
                kill(process.pid)
            else:
                for pid in family:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            assert process.wait(120) != 0
            kill(*family)
    with running("killed") as process:
        assert process.wait(180) == 0
    assert model_of(killed) == model_of(whole)
