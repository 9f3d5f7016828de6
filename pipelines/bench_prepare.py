"""Images/s of `prepare` beside its work alone, and the memory it takes, on made-up pictures of COCO's sizes.

A run is `layered prepare` in a process of its own, which starts a local Ray. Beside it stands its work alone, in a plain pool of
as many processes as there are cores: reading, decoding, resizing and encoding the pictures, or the text encoder. The work alone
is measured before and after each run, and the mean of both is taken, so that what else the machine does falls on both sides. A
run's speed counts everything from the command's start; the steady one counts from when every core has finished a file to the end.

Memory is resident memory without what is shared through Ray's object store, looked at four times a second: of the driver, of the
largest of Ray's workers, and of all of them.
"""

import functools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layered_model.text import TextEncoder, describe
from pipelines import costs, generated, schema
from pipelines.config import Config, UserError, load_config
from pipelines.generated import CORES
from pipelines.pictures import make_square
from pipelines.session import event

logger = logging.getLogger(__name__)

PRESET = "coco512"
ROWS_PER_FILE = {False: 256, True: schema.ROWS_PER_GROUP}
"""Without and with text; so that even a small run has files for all cores."""
NUM_ALONE = {False: 600, True: CORES * schema.ROWS_PER_GROUP}
"""Pictures of one measurement of the work alone, at most, without and with text."""
SECONDS_BETWEEN_LOOKS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    num_images: tuple[int, ...]
    "Of each run without text."
    num_text_images: int
    "Of the run with text; 0 for none."
    encoder: str | None
    "Of the run with text; None for one with random weights, of flan-t5-base's size."
    annotations: str | None
    "Captions file that sizes and captions are taken from; None to draw them."
    overrides: tuple[str, ...]
    "Settings of the preset, as on the command line."

    def __post_init__(self) -> None:
        if min(self.num_images) < 1:
            raise UserError(f"--num-images {min(self.num_images)} must be at least 1")
        if self.num_text_images < 0:
            raise UserError(f"--text-images {self.num_text_images} must not be negative")


@dataclass(slots=True)
class Memory:
    """Most resident bytes seen."""

    driver: int = 0
    worker: int = 0
    "Of the largest."
    workers: int = 0
    "Of all together."


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run."""

    num_images: int
    text: bool
    alone: float
    "Images/s of the work alone."
    whole: float
    "Images/s of the command."
    steady: float
    "Images/s from when every core has finished a file to the end; not a number for fewer files."
    memory: Memory


def run(settings: Settings, output: str | None = None) -> list[Result]:
    """Measures, prints a line a run, and returns and writes everything.

    Raises:
        UserError: a setting of the preset cannot be, or the encoder is not there.
    """
    load_config(PRESET, settings.overrides)
    about = [PRESET, *settings.overrides, f"{CORES} cores", costs.processor()]
    sys.stdout.write(f"prepare: {', '.join(about)}\n{_HEAD}\n")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        most = max(*settings.num_images, settings.num_text_images)
        event(logger, "generate", images=most)
        captions, pictures = generated.coco(folder, most, settings.annotations)
        runs = [(num_images, "none") for num_images in settings.num_images]
        if settings.num_text_images:
            made_up = functools.partial(generated.encoder, Path(folder, "encoder"), 768)
            encoder = settings.encoder or str(made_up(generated.T5_BASE))
            runs.append((settings.num_text_images, encoder))
        for number, (num_images, encoder) in enumerate(runs):
            some = generated.first_of(captions, num_images, Path(folder, f"{number}.json"))
            overrides = _overrides(some, pictures, encoder)
            overrides += [*settings.overrides, f"dataset={folder}/dataset{number}"]
            results.append(_measure(overrides, num_images))
            sys.stdout.write(_line(results[-1]) + "\n")
            sys.stdout.flush()
    if output is not None:
        everything = {"settings": asdict(settings), "runs": [asdict(one) for one in results]}
        Path(output).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return results


def _overrides(captions: Path, pictures: Path, encoder: str) -> list[str]:
    """Settings that make a run one of this benchmark."""
    settings = {
        "data.train_annotations": captions,
        "data.train_images": pictures,
        "data.val_annotations": "null",
        "data.val_images": "null",
        "data.rows_per_file": ROWS_PER_FILE[encoder != "none"],
        "text.encoder": encoder,
        "text.num_actors": CORES,
    }
    if encoder != "none":
        width = describe(encoder, max_tokens=1).width
        settings |= {"model.text_width": width}
    return [f"{key}={value}" for key, value in settings.items()]


def _measure(overrides: Sequence[str], num_images: int) -> Result:
    config = load_config(PRESET, overrides)
    text = config.text.encoder != "none"
    alone = _encoding if text else _picturing
    before = alone(config)
    began = time.time()
    with _watched([sys.executable, "-m", "pipelines.prepare", "--preset", PRESET, *overrides]) as (
        process,
        memory,
    ):
        code = process.wait()
    seconds = time.time() - began
    if code:
        raise UserError(f"`layered prepare` ended with exit code {code}")
    after = alone(config)
    times = sorted(file.stat().st_mtime for file in Path(config.dataset, "train").iterdir())
    steady = num_images - CORES * config.data.rows_per_file
    return Result(
        num_images=num_images,
        text=text,
        alone=(before + after) / 2,
        whole=num_images / seconds,
        steady=steady / (times[-1] - times[CORES - 1]) if steady > 0 else float("nan"),
        memory=memory,
    )


def _picturing(config: Config) -> float:
    """Images/s of reading, decoding, resizing and encoding pictures, on all cores."""
    assert config.data.train_images is not None
    paths = sorted(Path(config.data.train_images).iterdir())[: NUM_ALONE[False]]
    with _pool() as pool:
        work = functools.partial(_square, config)
        list(pool.map(work, paths[: 8 * CORES]))  # the processes start
        began = time.perf_counter()
        list(pool.map(work, paths, chunksize=8))
        return len(paths) / (time.perf_counter() - began)


def _square(config: Config, path: Path) -> int:
    data = config.data
    square = make_square(
        path.read_bytes(),
        resolution=config.model.resolutions[-1],
        place=None,
        image_format=data.image_format,
        quality=data.image_quality,
        max_pixels=data.max_pixels,
    )
    return len(square.content)


def _encoding(config: Config) -> float:
    """Images/s of encoding all captions of a picture, in as many processes of one thread as there are cores."""
    tree = json.loads(Path(str(config.data.train_annotations)).read_text(encoding="utf-8"))
    per_image = len(tree["annotations"]) / len(tree["images"])
    captions = [entry["caption"] for entry in tree["annotations"]]
    captions = captions[: round(per_image * NUM_ALONE[True])]
    step = round(per_image * schema.ROWS_PER_GROUP)  # what `prepare` encodes at once
    parts = [captions[start : start + step] for start in range(0, len(captions), step)]
    with _pool(_load_encoder, config) as pool:
        list(pool.map(_encode, [captions[:8]] * 4 * CORES))  # the processes start
        began = time.perf_counter()
        list(pool.map(_encode, parts))
        return len(captions) / per_image / (time.perf_counter() - began)


_encoder: Any = None
"""Of a process of the pool, with its batch size."""


def _load_encoder(config: Config) -> None:
    global _encoder
    torch.set_num_threads(1)
    text = config.text
    encoder = TextEncoder.from_pretrained(
        text.encoder, max_tokens=text.max_tokens, dtype=getattr(torch, text.precision)
    )
    _encoder = functools.partial(encoder.encode, batch_size=text.batch_size)


def _encode(captions: list[str]) -> int:
    return len(_encoder(captions).tokens)


def _pool(initializer: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(CORES, context, initializer, arguments)


@contextmanager
def _watched(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], Memory]]:
    """Runs a command and looks at its memory while it does."""
    process = subprocess.Popen(command)
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            _look(process.pid, memory)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield process, memory
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        ended.set()
        watcher.join()


def _look(driver: int, memory: Memory) -> None:
    """Adds what a process and Ray's workers below it take now."""
    processes = dict(filter(None, map(_process, os.listdir("/proc"))))
    workers = []
    for number, (_, is_worker, resident) in processes.items():
        ancestor = number
        while ancestor in processes and ancestor != driver:
            ancestor = processes[ancestor][0]
        if ancestor == driver and is_worker:
            workers.append(resident)
    if driver in processes:
        memory.driver = max(memory.driver, processes[driver][2])
    memory.worker = max(memory.worker, *workers, 0)
    memory.workers = max(memory.workers, sum(workers))


def _process(name: str) -> tuple[int, tuple[int, bool, int]] | None:
    """Number -> parent, whether it is one of Ray's workers, resident bytes that are not shared memory."""
    if not name.isdigit():
        return None
    try:
        command = Path("/proc", name, "cmdline").read_bytes()
        status = Path("/proc", name, "status").read_text(encoding="utf-8")
    except OSError:
        return None  # it has ended
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kilobytes = [int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssFile")]
    parent = int(fields["PPid"])
    return int(name), (parent, command.startswith(b"ray::"), 1024 * sum(kilobytes))


_HEAD = (
    "  images  text  alone/s  prepare/s  of alone  steady/s  of alone"
    "  driver MiB  largest worker MiB  all workers MiB"
)


def _line(result: Result) -> str:
    memory = result.memory
    return (
        f"{result.num_images:8}  {'on' if result.text else 'off':>4}  {result.alone:7.1f}"
        f"  {result.whole:9.1f}  {result.whole / result.alone:8.2f}"
        f"  {result.steady:8.1f}  {result.steady / result.alone:8.2f}"
        f"  {memory.driver / 2**20:10.0f}  {memory.worker / 2**20:18.0f}"
        f"  {memory.workers / 2**20:15.0f}"
    )
