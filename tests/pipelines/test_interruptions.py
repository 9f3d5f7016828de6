"""`prepare` killed by SIGKILL at random moments ends, on the same command, with the bytes of a run that nothing befell.

Each kind of process is killed once; ``LAYERED_KILLS=3`` makes it three times.
"""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import prepare
from pipelines.config import to_yaml

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray's own, on copying its settings
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NUM_KILLS = int(os.environ.get("LAYERED_KILLS", "1"))
NUM_PICTURES, ROWS_PER_FILE = 300, 10
NUM_FILES = NUM_PICTURES // ROWS_PER_FILE


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of JPEGs of a photograph's size, with a text beside each."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        coarse = np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(folder / f"{number}.jpg", quality=90)
    for number in range(8, NUM_PICTURES):
        os.link(folder / f"{number % 8}.jpg", folder / f"{number}.jpg")
    for number in range(NUM_PICTURES):
        (folder / f"{number}.txt").write_text("a red apple\n" * (1 + number % 5))
    return folder


@pytest.fixture
def config_of(configure, photos, t5, tmp_path):
    """Makes configurations for a dataset of this name."""

    def make(name: str, encoder: str = "none"):
        return configure(
            f"data.train_images={photos}",
            *(f"data.{key}=null" for key in ("train_annotations", "val_annotations", "val_images")),
            f"data.rows_per_file={ROWS_PER_FILE}",
            f"text.encoder={t5 if encoder == 't5' else encoder}",
            "model.text_width=24",
            "text.num_actors=2",
            f"dataset={tmp_path / name}",
        )

    return make


@pytest.fixture
def moments() -> random.Random:
    seed = int(os.environ.get("LAYERED_KILL_SEED", random.SystemRandom().randrange(2**32)))
    sys.stdout.write(f"LAYERED_KILL_SEED={seed}\n")  # shown when a test fails
    return random.Random(seed)


def hashes(dataset: str) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(dataset).rglob("*"))
        if path.is_file()
    }


def num_files(dataset: str) -> int:
    return len(list(Path(dataset, "train").glob("*.parquet")))


class Running:
    """`prepare` in a process of its own, with a Ray of its own."""

    def __init__(self, config, descendants, kill) -> None:
        self.descendants, self._kill = descendants, kill
        self.dataset = config.dataset
        self.folder = Path(tempfile.mkdtemp(prefix="k-", dir="/tmp"))  # for Ray's sockets
        (self.folder / "config.yaml").write_text(to_yaml(config))
        command = [sys.executable, "-m", "pipelines.prepare", "--run", str(self.folder)]
        self.log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(self.folder)},
            stdout=self.log,
            stderr=self.log,
        )
        self.family: dict[int, str] = {}

    def wait_for_files(self, number: int) -> None:
        while num_files(self.dataset) < number:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.01)

    def kill(self, name: str) -> None:
        """Kills the stage itself, or a process of its Ray, and waits for the end of the stage."""
        self.family = self.descendants(self.process.pid)
        if name == "driver":
            self._kill(self.process.pid)
        else:
            self._kill(next(pid for pid, line in self.family.items() if name in line))
        assert self.process.wait(60) != 0

    def close(self) -> None:
        """Ends whatever is left."""
        family = self.family | self.descendants(self.process.pid)
        self._kill(self.process.pid, *family)
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def test_killed_with_its_ray_it_goes_on_where_it_was(
    config_of, local_ray, moments, descendants, kill
):
    whole, config = config_of("whole"), config_of("killed")
    prepare.run(whole)
    kinds = ["driver", "raylet/raylet"] * NUM_KILLS
    moments.shuffle(kinds)
    # Far from the end: between the look and the kill some files more are finished.
    numbers = sorted(moments.sample(range(1, NUM_FILES // 2), len(kinds)))
    kept = 0
    for kind, number in zip(kinds, numbers, strict=True):
        with contextlib.closing(Running(config, descendants, kill)) as running:
            running.wait_for_files(max(number, kept + 1))
            time.sleep(moments.uniform(0, 0.2))
            running.kill(kind)
        assert kept <= num_files(config.dataset) < NUM_FILES
        kept = num_files(config.dataset)
    times = {path: path.stat().st_mtime_ns for path in Path(config.dataset).glob("train/*.parquet")}
    prepare.run(config)
    assert hashes(config.dataset) == hashes(whole.dataset)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_killed_workers_are_replaced(config_of, local_ray, moments, descendants, kill):
    """Those that decode and those that hold the encoder, while the stage runs."""
    whole, config = config_of("whole", "t5"), config_of("killed", "t5")
    prepare.run(whole)
    stage = threading.Thread(target=prepare.run, args=[config])
    stage.start()

    def at_work(kind: str) -> list[int]:
        return [pid for pid, line in descendants(os.getpid()).items() if kind in line]

    def one_at_work(kind: str) -> int:
        while not (pids := at_work(kind)):  # tasks come and go
            assert stage.is_alive(), f"it ended before {kind} could be killed"
            time.sleep(0.01)
        return moments.choice(pids)

    kinds = ["decode_unit", "EncodeAndWrite"] * NUM_KILLS
    moments.shuffle(kinds)
    for kind in kinds:
        one_at_work(kind)
        time.sleep(moments.uniform(0, 2))
        kill(one_at_work(kind))
    stage.join()
    assert hashes(config.dataset) == hashes(whole.dataset)
