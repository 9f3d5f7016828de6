"""Training batches from a prepared dataset: read, decoded and padded by threads, ahead of the model.

    order.take -> groups being read -> pictures being decoded -> batch

`Order` says which rows a worker's next batches have. Their row groups are requested `READ_AHEAD` rows ahead, and kept for as long
as a batch that is coming needs them, encoded and with one caption a picture only. Batches are decoded `DECODE_AHEAD` ahead. So
memory does not grow with the dataset, and what comes does not depend on how quickly any of it is done.

Decoding lets go of Python's lock, so threads are enough; docs/decisions.md compares. Which caption a picture is trained with, or
none (guidance needs a model that knows both), is decided here and nowhere else. Called by `trainer`, on each worker.
"""

import itertools
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import UserError
from pipelines.dataset import (
    PreparedDataset,
    RowGroup,
    pixels,
    read_row_group,
    text_of,
    text_rows,
)
from pipelines.order import Order
from pipelines.schema import IMAGE, TEXT, TEXT_LENGTHS

READ_AHEAD = 256
"""Rows of a worker between the request of their row group and their decoding: about a second's worth on a GPU."""
DECODE_AHEAD = 3
"""Batches that are being decoded, or wait, while the model works on one."""
NUM_READERS = 4
"""Threads that read; they mostly wait, for a disk or an object store."""
ROWS_PER_TASK = 16

T = TypeVar("T")


class Batch(NamedTuple):
    """What a worker trains on, on the CPU."""

    pictures: Tensor
    "uint8 [b, h, w, 3]"
    text: Tensor
    "float16 [b, n, d], zero where there is no token."
    text_mask: Tensor
    "bool [b, n], true where there is one; all false for a picture that is trained without its caption."


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of the sequence a worker takes, and how."""

    seed: int
    batch_size: int
    "Over all workers; a multiple of their number."
    text_dropout: float
    "Fraction of pictures without their caption."
    rank: int = 0
    world_size: int = 1
    first: int = 0
    "Pictures seen before, by all workers."
    num_threads: int = 1
    "That decode."


class Group(NamedTuple):
    """A row group in memory."""

    source: RowGroup
    images: pa.BinaryArray
    "Encoded pictures."
    texts: list[NDArray[np.float16] | None]
    "Of each picture, the embedding [tokens, width] of the caption that this epoch has for it, or none."


class Planned(NamedTuple):
    """A batch whose groups are being read."""

    places: NDArray[np.int64]
    "From `Order.take`."
    groups: dict[tuple[int, int], "Future[Group]"]
    "By epoch and number."


def batches(dataset: PreparedDataset, split: str, share: Share) -> Generator[Batch, None, None]:
    """Batches of one worker, in order and without end; close it.

    Raises:
        UserError: a file of the dataset is missing or damaged.
    """
    loader = _Loader(dataset, split, share)
    with ExitStack() as stack:
        stack.callback(loader.shut_down)
        read_ahead = -(-READ_AHEAD // loader.local_batch)
        planned = _ahead(map(loader.plan, itertools.count()), read_ahead)
        decoding = _ahead(map(loader.decode, planned), DECODE_AHEAD)
        for batch, tasks in decoding:
            for task in tasks:
                task.result()
            yield batch


class _Loader:
    """The threads of `batches`, and what they work on."""

    def __init__(self, dataset: PreparedDataset, split: str, share: Share) -> None:
        self.share = share
        self.settings = dataset.manifest.settings
        self.groups = dataset.row_groups(split)
        self.order = Order(
            [group.num_rows for group in self.groups], seed=share.seed, batch_size=share.batch_size
        )
        self.local_batch = share.batch_size // share.world_size
        self.readers = ThreadPoolExecutor(NUM_READERS, "reader")
        self.decoders = ThreadPoolExecutor(share.num_threads, "decoder")
        # A group stays for as long as a batch refers to it.
        self.resident: weakref.WeakValueDictionary[tuple[int, int], Future[Group]]
        self.resident = weakref.WeakValueDictionary()

    def shut_down(self) -> None:
        """Waits for what is running, and leaves the rest undone."""
        for pool in (self.decoders, self.readers):
            pool.shutdown(cancel_futures=True)

    def plan(self, number: int) -> Planned:
        """Finds the rows of this worker's next batch but ``number``, and has their groups read."""
        share = self.share
        first = share.first + number * share.batch_size + share.rank * self.local_batch
        places = self.order.take(first, self.local_batch)
        groups = {}
        for epoch, group in dict.fromkeys(map(tuple, places[:, :2].tolist())):
            future = self.resident.get((epoch, group))
            if future is None:
                future = self.readers.submit(self._read, epoch, group)
                self.resident[epoch, group] = future
            groups[epoch, group] = future
        return Planned(places, groups)

    def decode(self, planned: Planned) -> tuple[Batch, list["Future[None]"]]:
        """Begins a batch; it is complete when the tasks are."""
        num_rows, settings = len(planned.places), self.settings
        side = settings.resolution
        # By numpy: torch's threads would spin for a while after every batch that they fill with zeros.
        text_shape = (num_rows, settings.max_tokens, settings.text_width)
        batch = Batch(
            torch.from_numpy(np.empty((num_rows, side, side, 3), np.uint8)),
            torch.from_numpy(np.zeros(text_shape, np.float16)),
            torch.from_numpy(np.zeros(text_shape[:2], bool)),
        )
        step = min(ROWS_PER_TASK, -(-num_rows // self.share.num_threads))
        tasks = [
            self.decoders.submit(_fill, batch, planned, range(start, min(start + step, num_rows)))
            for start in range(0, num_rows, step)
        ]
        return batch, tasks

    def _read(self, epoch: int, group: int) -> Group:
        source = self.groups[group]
        table = read_row_group(source, [IMAGE, TEXT, TEXT_LENGTHS])
        images = table.column(IMAGE).combine_chunks().field("bytes")
        texts = []
        for row, draw in zip(text_rows(table), self.order.draws(epoch, group), strict=True):
            caption = choose(draw, len(row[TEXT_LENGTHS]), self.share.text_dropout)
            # A copy, or the other captions would stay in memory too.
            texts.append(None if caption is None else text_of(row, caption).copy())
        return Group(source, images, texts)


def choose(draw: float, num_captions: int, text_dropout: float) -> int | None:
    """Which caption a picture is trained with; None for none.

    Args:
        draw: Even in [0, 1).
        num_captions: Captions of the picture.
        text_dropout: Fraction of pictures without.
    """
    if draw < text_dropout:
        return None
    caption = int((draw - text_dropout) / (1.0 - text_dropout) * num_captions)
    return min(caption, num_captions - 1)  # the quotient may be rounded up to 1


def _fill(batch: Batch, planned: Planned, rows: Sequence[int]) -> None:
    """Decodes some pictures of a batch and puts their text beside them."""
    pictures, text, mask = (tensor.numpy() for tensor in batch)
    for i in rows:
        epoch, number, row = planned.places[i].tolist()
        group = planned.groups[epoch, number].result()
        try:
            pixels(group.images[row].as_buffer(), out=pictures[i])
        except Exception as error:  # Pillow raises nearly everything
            raise UserError(
                f"{group.source.path}: the picture of row {row} in row group "
                f"{group.source.row_group} cannot be decoded: {error}"
            ) from error
        if (tokens := group.texts[row]) is not None:
            text[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Takes ``depth`` items more than have been asked for."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
