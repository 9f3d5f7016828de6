"""Training batches from a prepared dataset, through Ray Data: shuffled, decoded ahead of the model, and exactly resumable.

The training set is an endless sequence of row groups, epoch after epoch, each a permutation of all of them. Worker r of n is
dealt groups r, r + n, r + 2n, ...; `WINDOW_GROUPS` of its groups at a time are a *window*, whose rows are permuted again. A
window is read, decoded and padded by one task of Ray Data. Order, caption and everything else random is a function of seed and
place in the sequence alone, so the position of a run is one number, the pictures seen, and nothing else need be saved.

With another number of workers the sequence stays and is dealt anew from the same position, so that up to a window a worker is
seen twice or left out for that epoch. Called by `trainer`, on each worker.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.dataset import RowGroup, decode_rows, read_row_group, text_of, text_rows
from pipelines.schema import IMAGE, TEXT, TEXT_LENGTHS

WINDOW_GROUPS = 4
ROWS_PER_BLOCK = 64
PICTURE, TOKENS, NUM_TOKENS = "picture", "tokens", "num_tokens"


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that are shuffled together."""

    groups: tuple[RowGroup, ...]
    seed: tuple[int, ...]
    "Of the permutation and the choice of captions."
    skip: int = 0
    "Rows of the permutation that were seen before."

    @property
    def num_rows(self) -> int:
        """Rows with those that are skipped."""
        return sum(group.num_rows for group in self.groups)


def group_sequence(groups: Sequence[RowGroup], seed: int) -> Iterator[RowGroup]:
    """All groups in a new order for each epoch, without end."""
    for epoch in count():
        for index in np.random.default_rng((seed, epoch)).permutation(len(groups)):
            yield groups[index]


def windows(
    groups: Sequence[RowGroup], *, seed: int, rank: int, world_size: int, first: int, num_rows: int
) -> list[Window]:
    """What one worker reads.

    Args:
        groups: All groups of the training set.
        seed: Of the run.
        rank: Which worker.
        world_size: How many workers.
        first: Rows that this worker has seen already.
        num_rows: Rows that it is still to see.
    """
    dealt = islice(group_sequence(groups, seed), rank, None, world_size)
    chosen: list[Window] = []
    missing = num_rows
    for index in count():
        window = Window(tuple(islice(dealt, WINDOW_GROUPS)), (seed, world_size, rank, index))
        if first >= window.num_rows:
            first -= window.num_rows
            continue
        if missing <= 0:
            return chosen
        chosen.append(Window(window.groups, window.seed, skip=first))
        missing -= window.num_rows - first
        first = 0
    raise AssertionError("count() does not end")


@dataclass(frozen=True, slots=True)
class ReadWindows:
    """Task of Ray Data: numbers of windows in, blocks of decoded pictures and padded text out."""

    windows: tuple[Window, ...]
    max_tokens: int

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, NDArray[Any]]]:
        """Yields blocks of at most `ROWS_PER_BLOCK` rows, so that large pictures stay within Ray's block size."""
        for window in (self.windows[number] for number in batch["id"]):
            rng = np.random.default_rng(window.seed)
            columns = [IMAGE, TEXT, TEXT_LENGTHS]
            tables = [read_row_group(group, columns) for group in window.groups]
            places = [(table, row) for table in tables for row in range(table.num_rows)]
            order = rng.permutation(len(places))[window.skip :]
            choices = rng.random(len(places))[window.skip :]
            for start in range(0, len(order), ROWS_PER_BLOCK):
                stop = start + ROWS_PER_BLOCK
                rows = [places[i][0].slice(places[i][1], 1) for i in order[start:stop]]
                yield self._block(rows, choices[start:stop])

    def _block(self, rows: list[Any], choices: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        table = pa.concat_tables(rows)
        texts = []
        for row, choice in zip(text_rows(table), choices, strict=True):
            texts.append(text_of(row, int(choice * len(row[TEXT_LENGTHS]))))
        tokens = np.zeros((len(texts), self.max_tokens, texts[0].shape[1]), dtype=np.float16)
        for target, text in zip(tokens, texts, strict=True):
            target[: len(text)] = text
        return {
            PICTURE: decode_rows(table),
            TOKENS: tokens,
            NUM_TOKENS: np.array([len(text) for text in texts], dtype=np.int64),
        }


def stream(
    chosen: Sequence[Window], *, batch_size: int, max_tokens: int, num_cpus: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one worker, in order.

    Windows are read ``num_cpus`` at a time by one run of Ray Data each, the next ones while the model works on these. One long
    run would do with less code, but where its output waits to be taken its scheduler never rests, and takes a core from training.

    Args:
        chosen: From `windows`.
        batch_size: Rows of a batch; what is left over at the end is dropped.
        max_tokens: Length that text is padded to.
        num_cpus: CPUs that this worker's reading may take.

    Yields:
        ``picture`` uint8 [b, h, w, 3], ``tokens`` float16 [b, n, d], ``num_tokens`` int64 [b], on the CPU.
    """
    step = max(1, int(num_cpus))
    parts = [tuple(chosen[start : start + step]) for start in range(0, len(chosen), step)]
    left: dict[str, NDArray[Any]] | None = None
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(_read, parts[0], max_tokens)
        for number in range(len(parts)):
            rows = coming.result()
            if number + 1 < len(parts):
                coming = reader.submit(_read, parts[number + 1], max_tokens)
            if left is not None:
                rows = {name: np.concatenate([left[name], rows[name]]) for name in rows}
            num_rows = len(rows[PICTURE])
            full = num_rows - num_rows % batch_size
            for start in range(0, full, batch_size):
                yield {
                    name: torch.from_numpy(values[start : start + batch_size])
                    for name, values in rows.items()
                }
            left = {name: values[full:] for name, values in rows.items()}


def _read(part: tuple[Window, ...], max_tokens: int) -> dict[str, NDArray[Any]]:
    """All rows of some windows, each window by a task of its own."""
    import ray.data

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray.data.range(len(part), override_num_blocks=len(part)).map_batches(
        ReadWindows(part, max_tokens), batch_size=1
    )
    blocks = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
