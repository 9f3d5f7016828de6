"""The work of one actor of the evaluation: blocks of pictures in, statistics of their features out.

A block is a fixed run of pictures by index, and says everything that decides its result: rows of the dataset, captions,
seeds. So it does not matter which actor does it, how many there are, or that one is done again. Called by `evaluate`.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from layered_model import LayeredPipeline
from layered_model.features import load_extractor
from layered_model.images import to_float, to_uint8
from layered_model.text import pad
from pipelines.config import Config
from pipelines.dataset import PreparedDataset, decode_rows, text_of, text_rows
from pipelines.metrics import ClassStatistics, FeatureStatistics, Statistics
from pipelines.schema import CAPTIONS, IMAGE, IMAGE_ID, TEXT, TEXT_LENGTHS
from pipelines.session import setup_logging

Kind = Literal["trained", "untrained", "reference"]


PICTURES_PER_SPLIT = 1000
"""The Inception-style score averages over up to 10 splits of at least this many pictures."""


class Caption(NamedTuple):
    """What one sample is drawn from."""

    row: int
    "Row of the split."
    caption: int
    "Which of the row's captions."
    seed: int
    "Of the sample's noise."


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """The unit of work: consecutive pictures of one kind."""

    kind: Kind
    captions: tuple[Caption, ...]
    "What to draw; of the reference only the rows matter."
    split: int
    "Part of the Inception-style score that the pictures belong to."
    num_shown: int
    "So many pictures, from the first, go on the grid."


class Scored(NamedTuple):
    """What became of a block."""

    statistics: dict[int, Statistics]
    "By resolution."
    shown: dict[int, NDArray[np.uint8]]
    "By resolution: pictures for the grid."


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


def cut(kind: Kind, captions: Sequence[Caption], size: int, num_shown: int = 0) -> list[Block]:
    """Cut pictures into blocks by index."""
    splits = num_splits(len(captions))
    return [
        Block(
            kind=kind,
            captions=tuple(captions[start : start + size]),
            split=start * splits // len(captions),
            num_shown=max(0, num_shown - start),
        )
        for start in range(0, len(captions), size)
    ]


def num_splits(num_images: int) -> int:
    """Parts of the Inception-style score."""
    return min(10, max(1, num_images // PICTURES_PER_SPLIT))


class Scorer:
    """What an actor does: turns blocks into statistics. Holds the dataset, the extractor and the models."""

    def __init__(self, config: Config, model: str, dataset: str) -> None:
        setup_logging()
        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_actor)))
        self.config = config
        self.device = "cuda" if config.train.use_gpu else "cpu"
        self.dataset = PreparedDataset.open(dataset)
        self.extractor = load_extractor(config.evaluate.extractor, self.device)
        self.trained = LayeredPipeline.from_pretrained(model, self.device)

    @functools.cached_property
    def untrained(self) -> LayeredPipeline:
        """The same network with fresh weights."""
        return self.trained.untrained()

    def score(self, number: int, block: Block) -> tuple[int, Scored]:
        """Return the block's number and what became of it."""
        pictures = self._reference(block) if block.kind == "reference" else self._draw(block)
        scored = Scored({}, {})
        for resolution, images in pictures.items():
            features, logits = self.extractor(images)
            scored.statistics[resolution] = Statistics(
                FeatureStatistics.from_features(features.cpu().numpy()),
                ClassStatistics.from_logits(logits.cpu().numpy()),
            )
            scored.shown[resolution] = images[: block.num_shown].numpy()
        return number, scored

    def _reference(self, block: Block) -> dict[int, torch.Tensor]:
        rows = [caption.row for caption in block.captions]
        table = self.dataset.read(self.config.evaluate.split, [IMAGE], rows)
        x0 = to_float(torch.from_numpy(decode_rows(table)))
        return {x.shape[-1]: to_uint8(x) for x in self.trained.diffusion.pyramid(x0)}

    def _draw(self, block: Block) -> dict[int, torch.Tensor]:
        rows = [caption.row for caption in block.captions]
        table = self.dataset.read(self.config.evaluate.split, [TEXT, TEXT_LENGTHS], rows)
        tokens = [
            torch.from_numpy(text_of(row, caption.caption).copy())
            for row, caption in zip(text_rows(table), block.captions, strict=True)
        ]
        sample = self.config.sample
        if block.kind == "untrained":
            # Without guidance: a fresh network's output is zero with any text, so it would change nothing.
            pipeline, guidance = self.untrained, 1.0
        else:
            pipeline, guidance = self.trained, sample.guidance
        return pipeline.sample(
            *pad(tokens, pipeline.config.text.max_tokens),
            [caption.seed for caption in block.captions],
            num_steps=sample.num_steps,
            guidance=guidance,
            sampler=sample.sampler,
        )
