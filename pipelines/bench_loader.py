"""Images/s of the training loader beside decoding alone, and beside other loaders, from the same dataset in the same run.

`bare` is decoding alone: a process a core that decodes pictures it holds in memory, and throws them away; `pillow` is the same
with Pillow. All others give batches of pictures, padded text of one caption each, and its mask (`rivals` says how), and decode
with the function of `bare`, in a thread or process a core. Rounds run them one after the other, in an order that rotates; ratios
are formed within a round. What comes before the first batches does not count, and a round reads every picture twice, so that what
was read ahead matters little.
"""

import functools
import json
import logging
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pipelines import costs, generated, loader, rivals
from pipelines.config import UserError, load_config
from pipelines.dataset import PreparedDataset, pixels, read_row_group
from pipelines.loader import Share
from pipelines.schema import IMAGE
from pipelines.session import Needs, connect, event

logger = logging.getLogger(__name__)

PRESET = "coco512"
TEXT_WIDTH = 768
"""Of made-up text: that of T5-base."""
WARM_UP = 8
"""Batches that do not count."""
BARE_BYTES = 256 * 2**20
"""Encoded pictures that a process of `bare` holds, at most."""

Decode = Callable[[pa.Buffer], NDArray[np.uint8]]
OURS, BARE, PILLOW = "layered", "bare", "pillow"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    dataset: str | None
    "A prepared dataset; None makes one up."
    num_images: int
    "Of the made-up dataset."
    batch_size: int
    threads: int
    repeats: int
    "Rounds that count."
    overrides: tuple[str, ...]
    "Settings of the preset that the made-up dataset is prepared with."

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size", "threads", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


@dataclass(frozen=True, slots=True)
class Result:
    """Of one loader."""

    speeds: list[float]
    "Images/s in each round."
    of_bare: costs.Spread
    "Relative to decoding alone in the same round."


def run(settings: Settings, output: str | None = None) -> dict[str, Result]:
    """Measures, prints a table, and returns and writes everything.

    Raises:
        UserError: there is no such dataset, or a setting of the preset cannot be.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = settings.dataset or _make_dataset(folder, settings)
        dataset = PreparedDataset.open(path)
        speeds = _rounds(dataset, settings, Path(folder))
    results = {
        name: Result(taken, costs.ratio(taken, speeds[BARE])) for name, taken in speeds.items()
    }
    sys.stdout.write(_table(dataset, settings, results) + "\n")
    for name, reason in rivals.installed().items():
        if reason is not None:
            sys.stdout.write(f"{name}: not compared: {reason}\n")
    if output is not None:
        everything = {name: asdict(result) for name, result in results.items()}
        text = json.dumps({"settings": asdict(settings), "loaders": everything}, indent=1)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return results


def _make_dataset(folder: str, settings: Settings) -> str:
    """Pictures and captions of COCO's sizes, prepared with a small encoder."""
    event(logger, "generate", images=settings.num_images)
    captions, pictures = generated.coco(folder, settings.num_images)
    encoder = generated.encoder(Path(folder, "encoder"), TEXT_WIDTH)
    overrides = [
        f"data.train_annotations={captions}",
        f"data.train_images={pictures}",
        "data.val_annotations=null",
        "data.val_images=null",
        f"text.encoder={encoder}",
        "text.num_actors=1",
        f"model.text_width={TEXT_WIDTH}",
        *settings.overrides,
        f"dataset={folder}/dataset",
    ]
    dataset = load_config(PRESET, overrides).dataset
    command = [sys.executable, "-m", "pipelines.prepare", "--preset", PRESET, *overrides]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"`layered prepare` ended with exit code {code}")
    return dataset


def _rounds(dataset: PreparedDataset, settings: Settings, folder: Path) -> dict[str, list[float]]:
    """Images/s of each loader in each round."""
    shape = rivals.Shape.of(dataset, settings.batch_size)
    config = load_config(PRESET, [f"ray.num_cpus={settings.threads}"])
    jobs: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        bare = stack.enter_context(_Bare(dataset, settings))
        jobs[BARE] = functools.partial(bare.speed, pixels)
        jobs[PILLOW] = functools.partial(bare.speed, _with_pillow)
        streams = {OURS: functools.partial(_ours, dataset, settings)} | {
            name: functools.partial(
                getattr(rivals, name), dataset, shape, settings.threads, folder / name
            )
            for name, reason in rivals.installed().items()
            if reason is None
        }
        for name, stream in streams.items():
            jobs[name] = functools.partial(_speed, stream, dataset, settings)
        if "ray_data" in jobs:
            stack.enter_context(connect(config, Needs(stage="bench")))
        speeds: dict[str, list[float]] = {name: [] for name in jobs}
        names = list(jobs)
        for index in range(-1, settings.repeats):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                speed = jobs[name]()
                event(logger, "round", number=index, loader=name, images_per_second=speed)
                if index >= 0:
                    speeds[name].append(speed)
    return speeds


def _ours(dataset: PreparedDataset, settings: Settings) -> Iterator[loader.Batch]:
    share = Share(
        seed=0,
        batch_size=settings.batch_size,
        text_dropout=0.1,
        num_threads=settings.threads,
    )
    return loader.batches(dataset, "train", share)


def _speed(make: Callable[[], Any], dataset: PreparedDataset, settings: Settings) -> float:
    """Images/s of a stream of batches."""
    num_batches = 2 * dataset.num_images("train") // settings.batch_size + 1
    with closing(make()) as stream:
        for _ in range(WARM_UP):
            next(stream)
        began = time.perf_counter()
        for _ in range(num_batches):
            next(stream)
        return num_batches * settings.batch_size / (time.perf_counter() - began)


class _Bare:
    """Decoding alone."""

    def __init__(self, dataset: PreparedDataset, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.num_processes, self.num_images = settings.threads, 2 * dataset.num_images("train")
        self.pool = ProcessPoolExecutor(settings.threads, context, _load_pictures, (dataset.path,))

    def __enter__(self) -> "_Bare":
        self._run(pixels, [1] * 8 * self.num_processes)  # the processes start
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def speed(self, decode: Decode) -> float:
        """Images/s."""
        parts = [16] * (self.num_images // 16 + 1)
        began = time.perf_counter()
        self._run(decode, parts)
        return sum(parts) / (time.perf_counter() - began)

    def _run(self, decode: Decode, parts: list[int]) -> None:
        for _ in self.pool.map(functools.partial(_decode, decode), parts):
            pass


_pictures: list[pa.Buffer] = []
"""What a process of `_Bare` holds."""


def _load_pictures(path: str) -> None:
    dataset, held = PreparedDataset.open(path), 0
    for group in dataset.row_groups("train"):
        table = read_row_group(group, [IMAGE])
        images = table.column(IMAGE).combine_chunks().field("bytes")
        _pictures.extend(image.as_buffer() for image in images)
        held += table.nbytes
        if held > BARE_BYTES:
            return


def _decode(decode: Decode, count: int) -> None:
    """Decodes the next pictures, from the first again after the last."""
    for _ in range(count):
        _pictures.append(_pictures.pop(0))
        decode(_pictures[-1])


def _with_pillow(content: pa.Buffer) -> NDArray[np.uint8]:
    with Image.open(pa.BufferReader(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _table(dataset: PreparedDataset, settings: Settings, results: dict[str, Result]) -> str:
    """The figures for a person."""
    made = dataset.manifest.settings
    lines = [
        f"loader: {dataset.num_images('train')} pictures, {made.resolution} px {made.image_format}, "
        f"text of width {made.text_width}; batches of {settings.batch_size}; {settings.threads} "
        f"threads or processes, {costs.processor()}; median (quartiles) of {settings.repeats} rounds",
        f"{'':14}{'images/s':>24}{'of bare decoding':>24}",
    ]
    for name, result in results.items():
        speed, ratio = costs.Spread.of(result.speeds), result.of_bare
        cells = [
            f"{speed.median:.0f} ({speed.low:.0f}-{speed.high:.0f})",
            f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
        ]
        lines.append(f"{name:14}{cells[0]:>24}{cells[1]:>24}")
    return "\n".join(lines)
