"""A thousand damaged files among a thousand good ones: exactly they are rejected, each with a reason, in bounded memory."""

import functools
import io
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.schema import Settings

NUM_OF_EACH = 1000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
HUGE = 65_000


def encode(number: int, image_format: str, **options: object) -> bytes:
    """One of forty pictures."""
    return _encode(number % 40, image_format, **options)


@functools.cache
def _encode(number: int, image_format: str, **options: object) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels).resize((128, 96), Image.Resampling.BICUBIC)
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """A bit of every hundredth byte; the first fifty stay, so that it is still a picture."""
    changed = bytearray(content)
    for at in rng.choice(np.arange(50, len(content)), max(1, len(content) // 100), replace=False):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def bomb(number: int) -> bytes:
    """A small file that says, or truly is, a picture of far more pixels than memory has room for."""
    kind = number % 4
    if kind == 0:
        return sound_bomb()
    if kind == 1:
        return png(HUGE, zlib.compress(b""))
    jpeg = bytearray(encode(number, "JPEG", progressive=kind == 3))
    frame = jpeg.index(b"\xff\xc2" if kind == 3 else b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", HUGE, HUGE)
    return bytes(jpeg)


@functools.cache
def sound_bomb() -> bytes:
    """50 KB that are a whole picture of 400 megapixels, black."""
    side = 20_000
    return png(side, zlib.compress(bytes((side // 8 + 1) * side)))


def png(side: int, data: bytes) -> bytes:
    """A PNG of one bit a pixel."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def damage(number: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """What is wrong, and the file."""
    kind = ("cut", "flipped", "another type", "empty", "huge")[number % 5]
    image_format = FORMATS[number // 5 % len(FORMATS)]
    if kind == "cut":
        content = encode(number, image_format)
        return kind, content[: int(len(content) * rng.uniform(0.1, 0.9))]
    if kind == "flipped":  # the formats in which it can be seen
        return kind, flip(encode(number, ("JPEG", "PNG")[number // 5 % 2], quality=95), rng)
    if kind == "another type":
        texts = [b"%PDF-1.7", b"<html>404</html>", b"PK\x03\x04", rng.bytes(3000), b"\x00" * 500]
        return kind, texts[number // 5 % len(texts)]
    return kind, b"" if kind == "empty" else bomb(number // 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """Folder with ``captions.json`` and pictures, and what is wrong with which."""
    folder = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    damaged, images = {}, []
    for number in range(NUM_OF_EACH):
        good = encode(number, FORMATS[number % len(FORMATS)])
        damaged[number + NUM_OF_EACH], bad = damage(number, rng)
        for image_id, content in ((number, good), (number + NUM_OF_EACH, bad)):
            images.append({"id": image_id, "file_name": f"{image_id}.jpg"})
            (folder / f"{image_id}.jpg").write_bytes(content)
    captions = [{"id": 0, "image_id": image["id"], "caption": "x"} for image in images]
    tree = {"images": images, "annotations": captions}
    (folder / "captions.json").write_text(json.dumps(tree))
    return folder, damaged


WORK = """
import json, resource, sys
from pipelines import units
from pipelines.schema import Settings
from pipelines.sources import CocoCaptions

folder, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
source = CocoCaptions(path=f"{folder}/captions.json", images=folder, key="")
entries = units.to_bytes(source.listing().entries)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = {"split": "train", "index": 0, "entries": entries}
made = units.decode_unit(row, sources={"train": source}, settings=settings)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
for name in ("table", "rejects"):
    with open(f"{folder}/{name}", "wb") as file:
        file.write(made[name])
print(used * 1024)
assert "torch" not in sys.modules
"""


def test_exactly_the_damaged_are_rejected(source):
    folder, damaged = source
    settings = dict.fromkeys(Settings.__slots__) | {
        "crop": "center",
        "resolution": 32,
        "image_format": "jpeg",
        "image_quality": 90,
        "max_pixels": 10_000_000,
    }
    work = [sys.executable, "-W", "error", "-c", WORK, str(folder), json.dumps(settings)]
    done = subprocess.run(work, check=True, capture_output=True, text=True)
    good, rejects = (
        pa.ipc.open_stream(folder / name).read_all().to_pylist() for name in ("table", "rejects")
    )
    missed = Counter(damaged[row["image_id"]] for row in good if row["image_id"] in damaged)
    assert not missed
    assert sorted(row["image_id"] for row in good) == list(range(NUM_OF_EACH))
    assert {row["image_id"] for row in rejects} == set(damaged)
    assert all(row["stage"] == "decode" and row["error"] for row in rejects)
    huge = [row["error"] for row in rejects if damaged[row["image_id"]] == "huge"]
    assert all("pixels are more than 10000000" in error for error in huge)
    assert int(done.stdout) < 150 * 2**20
