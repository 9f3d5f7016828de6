"""Images/s of `prepare` against its work alone: the same decoding, resizing and text encoding without Ray.

    python tests/benchmarks/bench_prepare.py [preset] [key=value ...]

`work alone` is what every core together could do if nothing else cost anything: 1 / (1 / decoding + 1 / encoding).
`steady` leaves out what comes before the first file: Ray's workers start and load the encoder. Writes to a temporary
directory. Where the encoder has a GPU, compare with decoding alone.
"""

import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from layered_model.text import TextEncoder
from pipelines import pictures, prepare, storage
from pipelines.annotations import read_annotations
from pipelines.config import Config, load_config
from pipelines.session import Needs, connect, set_environment, setup_logging

CORES = len(os.sched_getaffinity(0))


def _decode(path: str, resolution: int, image_format: str, quality: int) -> int:
    picture = pictures.decode(Path(path).read_bytes())
    square = pictures.crop_square(picture, resolution)
    return len(pictures.encode(square, image_format, quality))  # type: ignore[arg-type]


def decoding(config: Config) -> float:
    """Images/s of reading, decoding, resizing and encoding again, on all cores."""
    folder = storage.absolute(config.data.train_images)
    annotations = storage.absolute(config.data.train_annotations)
    entries = read_annotations(annotations, "data.train_annotations").entries
    jobs = [
        (f"{folder}/{entry.file_name}", config.model.resolutions[-1], config.data.image_format, 95)
        for entry in entries
        if entry.error is None
    ][:2000]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(CORES, context) as pool:
        list(pool.map(_decode, *zip(*jobs[: 4 * CORES], strict=True)))  # the workers start
        began = time.perf_counter()
        list(pool.map(_decode, *zip(*jobs, strict=True), chunksize=16))
        return len(jobs) / (time.perf_counter() - began)


def encoding(config: Config) -> tuple[float, float]:
    """Captions/s on all cores, if each were as fast as one thread is; and captions of an image."""
    import torch

    torch.set_num_threads(1)
    annotations = storage.absolute(config.data.train_annotations)
    entries = read_annotations(annotations, "data.train_annotations").entries
    captions = [text for entry in entries for text in entry.captions]
    encoder = TextEncoder.from_pretrained(config.text.encoder, max_tokens=config.text.max_tokens)
    encoder.encode(captions[:64], config.text.batch_size)
    began = time.perf_counter()
    encoder.encode(captions[:1000], config.text.batch_size)
    speed = len(captions[:1000]) / (time.perf_counter() - began)
    return speed * CORES, len(captions) / len(entries)


def preparing(preset: str, overrides: list[str]) -> tuple[float, float, float]:
    """Seconds to the first file, images/s from there on, and images/s in all; Ray's own start not counted."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(preset, [*overrides, f"dataset={folder}/dataset"])
        with connect(config, Needs(stage="bench")):
            began = time.time()
            manifest = prepare.run(config)
            seconds = time.time() - began
        files = [file for split in manifest.splits.values() for file in split.files if file.rows]
        written = sorted(
            (Path(folder, "dataset", file.path).stat().st_mtime, file.rows) for file in files
        )
    first, last = written[0][0], written[-1][0]
    rows = sum(rows for _, rows in written)
    return first - began, (rows - written[0][1]) / (last - first), rows / seconds


def main() -> None:
    """Prints one line a figure."""
    preset, *overrides = sys.argv[1:] or ["demo"]
    setup_logging()
    set_environment()
    config = load_config(preset, overrides)
    decoded = decoding(config)
    captions, per_image = encoding(config)
    alone = 1 / (1 / decoded + per_image / captions)
    start, steady, whole = preparing(preset, overrides)
    lines = [
        f"cores={CORES}",
        f"decoding alone:  {decoded:8.1f} images/s",
        f"encoding alone:  {captions:8.1f} captions/s, {per_image:.2f} captions an image",
        f"work alone:      {alone:8.1f} images/s",
        f"prepare:         {whole:8.1f} images/s in all; first file after {start:.1f} s",
        f"prepare, steady: {steady:8.1f} images/s",
        f"steady / work alone = {steady / alone:.2f}; steady / decoding = {steady / decoded:.2f}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
