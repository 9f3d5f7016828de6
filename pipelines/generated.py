"""Pictures and captions made up in COCO's layout and sizes, and a small text encoder: for measuring at any scale.

A picture is a piece of a field of 1/f noise, which has the spectrum of photographs, with a contrast at which its file has COCO's
mean 0.57 bytes a pixel. Sizes and numbers of words are drawn from COCO's (`SIZES`, `NUM_WORDS`: val2017), or are those of an
annotation file. The encoder is a T5 with random weights. Called by `bench_prepare` and `bench_loader`.
"""

import functools
import io
import json
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CORES = len(os.sched_getaffinity(0))

SIZES = {
    (640, 480): 1061,
    (640, 427): 767,
    (480, 640): 336,
    (500, 375): 240,
    (640, 425): 412,
    (427, 640): 291,
    (612, 612): 106,
    (375, 500): 94,
    (500, 333): 80,
    (640, 640): 54,
    (640, 360): 53,
}
"""Width and height -> pictures, of the most frequent 3,494 of 5,000; neighbours of a pixel or two are counted as one."""

NUM_WORDS = {7: 211, 8: 4073, 9: 5573, 10: 5340, 11: 3816, 12: 2470, 13: 1448, 14: 831, 15: 457}
"""Words of a caption -> captions, 97 % of 25,014; the rest is longer, up to 50."""

CAPTIONS_PER_PICTURE = 5
WORDS = (
    "a an the of on in with and is to at next near by over under two three some several many man woman person people boy girl "
    "child dog cat horse bird bear sheep cow elephant train bus car truck plane boat bike street road field beach room kitchen "
    "bathroom table bench bed plate pizza cake fruit clock sign tennis baseball skateboard surfboard umbrella phone laptop "
    "sitting standing holding riding walking playing eating looking wearing parked white black red blue green brown yellow "
    "large small young old wooden top front side group field water snow grass tree building window ball game"
)

T5_TINY = {"d_kv": 8, "d_ff": 8, "num_heads": 1, "num_layers": 1}
"""The least that is one."""
T5_BASE = {"d_kv": 64, "d_ff": 2048, "num_heads": 12, "num_layers": 12}
"""As google/flan-t5-base, the encoder of the preset coco512; its width is 768."""

_SIDE = 1400
"""Of the fields that pictures are cut from."""
_NUM_FIELDS = 4
_CONTRAST = 39.0


def coco(
    directory: str | Path, num_images: int, annotations: str | None = None
) -> tuple[Path, Path]:
    """Writes pictures and their captions.

    Args:
        directory: existing; gets ``pictures/`` and ``captions.json``.
        num_images: how many.
        annotations: a captions file of COCO's form, whose sizes and captions are taken, again and again if
            they are too few; None to draw both.

    Returns:
        Paths of the captions file and the pictures' folder.
    """
    folder = Path(directory, "pictures")
    folder.mkdir()
    sizes, captions = _drawn(num_images) if annotations is None else _real(annotations, num_images)
    tree: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    for number, ((width, height), texts) in enumerate(zip(sizes, captions, strict=True)):
        about = {"id": number, "file_name": _name(number), "width": width, "height": height}
        tree["images"].append(about)
        for text in texts:
            place = len(tree["annotations"])
            tree["annotations"].append({"id": place, "image_id": number, "caption": text})
    path = Path(directory, "captions.json")
    path.write_text(json.dumps(tree), encoding="utf-8")
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        write = functools.partial(_write_picture, folder)
        for _ in pool.map(write, range(num_images), sizes, chunksize=64):
            pass
    return path, folder


def first_of(captions: Path, num_images: int, path: Path) -> Path:
    """Writes a captions file with the first pictures of another."""
    tree = json.loads(captions.read_text(encoding="utf-8"))
    chosen = {
        "images": tree["images"][:num_images],
        "annotations": [entry for entry in tree["annotations"] if entry["image_id"] < num_images],
    }
    path.write_text(json.dumps(chosen), encoding="utf-8")
    return path


def encoder(directory: str | Path, width: int, sizes: Mapping[str, int] = T5_TINY) -> Path:
    """Writes a text encoder of any width: a token a word, and one for the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    # Untyped, or with types that a mapping's values cannot satisfy.
    make: Any = PreTrainedTokenizerFast
    configure: Any = T5Config
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.post_processor = end
    make(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    config = configure(
        vocab_size=len(words), d_model=width, feed_forward_proj="gated-gelu", **sizes
    )
    T5EncoderModel(config).save_pretrained(directory)
    return Path(directory)


def _drawn(num_images: int) -> tuple[list[tuple[int, int]], list[list[str]]]:
    rng = np.random.default_rng(0)
    sizes = rng.choice(list(SIZES), num_images, p=_shares(SIZES.values()))
    lengths = rng.choice(
        list(NUM_WORDS), (num_images, CAPTIONS_PER_PICTURE), p=_shares(NUM_WORDS.values())
    )
    words = WORDS.split()
    captions = [[" ".join(rng.choice(words, n)) for n in row] for row in lengths]
    return [(int(width), int(height)) for width, height in sizes], captions


def _real(annotations: str, num_images: int) -> tuple[list[tuple[int, int]], list[list[str]]]:
    tree = json.loads(Path(annotations).read_text(encoding="utf-8"))
    texts: dict[int, list[str]] = {image["id"]: [] for image in tree["images"]}
    for entry in tree["annotations"]:
        texts[entry["image_id"]].append(entry["caption"])
    images = [tree["images"][number % len(tree["images"])] for number in range(num_images)]
    sizes = [(image["width"], image["height"]) for image in images]
    return sizes, [texts[image["id"]] for image in images]


def _shares(counts: Iterable[int]) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = np.array(list(counts), dtype=np.float64)
    shares: NDArray[np.float64] = numbers / numbers.sum()
    return shares


def _name(number: int) -> str:
    return f"{number:012d}.jpg"


def _write_picture(folder: Path, number: int, size: Sequence[int]) -> None:
    """A piece of a field, turned over or not; the same for the same number."""
    rng = np.random.default_rng((1, number))
    width, height = size
    field = _field(int(rng.integers(_NUM_FIELDS)))
    top, left = rng.integers(_SIDE - height), rng.integers(_SIDE - width)
    pixels = field[top : top + height, left : left + width]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "jpeg", quality=90)
    Path(folder, _name(number)).write_bytes(buffer.getvalue())


@functools.cache
def _field(number: int) -> NDArray[np.uint8]:
    """Noise with the spectrum of photographs, in three channels that have much in common."""
    rng = np.random.default_rng((2, number))
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(4):
        spectrum = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE))) / frequency
        plane = np.fft.irfft2(spectrum, (_SIDE, _SIDE))
        planes.append(plane / plane.std())
    colours = np.stack([planes[0] + 0.5 * plane for plane in planes[1:]], axis=-1)
    return np.clip(128 + _CONTRAST * colours, 0, 255).astype(np.uint8)
