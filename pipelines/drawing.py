"""Pictures to be scored: drawn for captions of a prepared dataset, or the dataset's own, at every resolution.

What picture i of an evaluation is depends on (seed, i) and on the layout of batches (`batches_of`), which is fixed by index. So
it does not matter which process draws it, how many there are, or that it is drawn again. Called by `extraction` and
`running_score`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray

from layered_model import LayeredPipeline
from layered_model.diffusion import LayeredDiffusion
from layered_model.images import to_float, to_uint8
from layered_model.rows import Prompt
from layered_model.text import pad
from pipelines.dataset import PreparedDataset, decode_rows, text_of, text_rows
from pipelines.schema import CAPTIONS, IMAGE, IMAGE_ID, TEXT, TEXT_LENGTHS
from pipelines.sections import SampleConfig

Pyramid = dict[int, UInt8[ndarray, "n h w 3"]]
"The same pictures at each resolution."


class Caption(NamedTuple):
    """What one picture is drawn from."""

    row: int
    "Row of the split."
    caption: int
    "Which of the row's captions."
    seed: int
    "Of the picture's noise."


def choose_captions(
    dataset: PreparedDataset, split: str, num_images: int, seed: int
) -> list[Caption]:
    """Choose N pictures of a split and a caption of each; only seed and image ids matter, not files or their order."""
    rows = dataset.read(split, [IMAGE_ID, CAPTIONS]).to_pylist()
    hashes = [_hash(f"{seed}/{row[IMAGE_ID]}") for row in rows]
    order = sorted(range(len(rows)), key=hashes.__getitem__)[:num_images]
    return [
        Caption(row, hashes[row] % len(rows[row][CAPTIONS]), _hash(f"{seed}:{i}"))
        for i, row in enumerate(order)
    ]


def _hash(text: str) -> int:
    """63 bits, which a seed may have."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def texts_of(dataset: PreparedDataset, split: str, captions: Sequence[Caption]) -> list[str]:
    """The words of captions."""
    rows = [caption.row for caption in captions]
    lists = dataset.read(split, [CAPTIONS], rows).column(CAPTIONS).to_pylist()
    return [texts[caption.caption] for texts, caption in zip(lists, captions, strict=True)]


def draw(
    pipeline: LayeredPipeline,
    dataset: PreparedDataset,
    split: str,
    captions: Sequence[Caption],
    options: SampleConfig,
    batch_size: int,
    above: Mapping[int, Sequence[Caption]] | None = None,
) -> Pyramid:
    """Draw a picture for each caption.

    Batches are all of one size, the last filled up: a network's sums differ in the last digits from one size to another.

    Args:
        pipeline: what draws.
        dataset: whose captions, already encoded, they are.
        split: of the dataset.
        captions: one a picture, at least one.
        options: steps, guidance, sampler.
        batch_size: pictures drawn together.
        above: for some of the resolutions above the lowest, captions whose words that layer follows.
    """
    tokens = {
        resolution: _tokens(dataset, split, found)
        for resolution, found in ({0: captions} | dict(above or {})).items()
    }

    def texts(resolution: int, numbers: Sequence[int]) -> Prompt:
        found = [tokens[resolution][number] for number in numbers]
        return Prompt(*pad(found, pipeline.config.text.max_tokens))

    parts = []
    for numbers in batches_of(len(captions), batch_size):
        parts.append(
            pipeline.sample(
                *texts(0, numbers),
                [captions[number].seed for number in numbers],
                layer_prompts={
                    resolution: texts(resolution, numbers) for resolution in above or {}
                },
                **options.arguments,
            )
        )
    return {
        resolution: np.concatenate([part[resolution].cpu().numpy() for part in parts])[
            : len(captions)
        ]
        for resolution in pipeline.resolutions
    }


def _tokens(
    dataset: PreparedDataset, split: str, captions: Sequence[Caption]
) -> list[torch.Tensor]:
    """Embeddings of captions."""
    table = dataset.read(split, [TEXT, TEXT_LENGTHS], [caption.row for caption in captions])
    return [
        torch.from_numpy(text_of(row, caption.caption).copy())
        for row, caption in zip(text_rows(table), captions, strict=True)
    ]


def batches_of(num_images: int, batch_size: int) -> Iterator[list[int]]:
    """Numbers of pictures in batches of one size, the last filled up with its last picture."""
    for start in range(0, num_images, batch_size):
        yield [min(start + place, num_images - 1) for place in range(batch_size)]


def real_pictures(
    diffusion: LayeredDiffusion, dataset: PreparedDataset, split: str, rows: Sequence[int]
) -> Pyramid:
    """Pictures of a split; lower resolutions by the model's own downscale, clamped, in 8 bits."""
    pixels = torch.from_numpy(decode_rows(dataset.read(split, [IMAGE], list(rows))))
    return {x.shape[-1]: to_uint8(x).numpy() for x in diffusion.pyramid(to_float(pixels))}
