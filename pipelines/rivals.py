"""Other loaders, for `bench_loader`: each gives without end batches of the same three tensors from the same pictures and text.

    ray_data       Ray Data over the Parquet files, in an order of files and through a buffer that shuffles
    hugging_face   `datasets` over its Arrow copy of the Parquet files, behind torch's DataLoader
    streaming      mosaicml-streaming over a copy in its own format, behind torch's DataLoader

Each is set up as its own documentation says, and decodes with our function. The last two have as many processes as we have
threads, and Ray Data is told of as many CPUs.
"""

import importlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from pipelines.dataset import PreparedDataset, pixels, read_row_group, text_of, text_rows
from pipelines.schema import IMAGE, TEXT, TEXT_LENGTHS

COLUMNS = [IMAGE, TEXT, TEXT_LENGTHS]
PACKAGES = {"ray_data": "ray.data", "hugging_face": "datasets", "streaming": "streaming"}
SHUFFLE_BATCHES = 4
"""Of Ray Data's buffer."""


class Shape(NamedTuple):
    """Of batches."""

    batch_size: int
    resolution: int
    max_tokens: int
    text_width: int

    @classmethod
    def of(cls, dataset: PreparedDataset, batch_size: int) -> "Shape":
        """That which a dataset asks for."""
        made = dataset.manifest.settings
        return cls(batch_size, made.resolution, made.max_tokens, made.text_width)


class Assemble:
    """Encoded pictures and text of all captions -> pictures, text of one caption each, and its mask."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __call__(self, table: pa.Table) -> list[Tensor]:
        """Of the rows of a table."""
        images = table.column(IMAGE).combine_chunks().field("bytes")
        return self.rows([image.as_buffer() for image in images], list(text_rows(table)))

    def rows(self, images: Sequence[Any], texts: Sequence[Any]) -> list[Tensor]:
        """Of rows, each with its columns of text."""
        side, num_tokens = self.shape.resolution, self.shape.max_tokens
        pictures = np.empty((len(images), side, side, 3), np.uint8)
        text = np.zeros((len(images), num_tokens, self.shape.text_width), np.float16)
        mask = np.zeros((len(images), num_tokens), bool)
        for i, (image, row) in enumerate(zip(images, texts, strict=True)):
            pixels(image, out=pictures[i])
            tokens = text_of(row, random.randrange(len(row[TEXT_LENGTHS])))
            text[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True
        return [torch.from_numpy(array) for array in (pictures, text, mask)]

    def samples(self, samples: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Of what `streaming` stores."""
        texts = [
            {
                TEXT: np.frombuffer(sample[TEXT], np.float16),
                TEXT_LENGTHS: np.frombuffer(sample[TEXT_LENGTHS], np.int32),
            }
            for sample in samples
        ]
        return self.rows([sample[IMAGE] for sample in samples], texts)


def installed() -> dict[str, str | None]:
    """Each loader, and why it cannot be compared with; None if it can."""
    found: dict[str, str | None] = {}
    for name, package in PACKAGES.items():
        try:
            importlib.import_module(package)
            found[name] = None
        except (
            Exception
        ) as error:  # a package that is there but does not fit the others raises anything
            found[name] = f"{type(error).__name__}: {error}"
    return found


def ray_data(
    dataset: PreparedDataset, shape: Shape, num_processes: int, folder: Path
) -> Iterator[Any]:
    """See the module."""
    import ray.data

    del num_processes, folder  # of the Ray that runs
    paths = sorted({group.path for group in dataset.row_groups("train")})
    assemble = Assemble(shape)

    def decode(table: pa.Table) -> dict[str, NDArray[Any]]:
        return dict(zip(COLUMNS, (tensor.numpy() for tensor in assemble(table)), strict=True))

    data = ray.data.read_parquet(paths, columns=COLUMNS, shuffle="files").map_batches(
        decode, batch_format="pyarrow", batch_size=shape.batch_size, zero_copy_batch=True
    )
    while True:
        yield from data.iter_torch_batches(
            batch_size=shape.batch_size,
            local_shuffle_buffer_size=SHUFFLE_BATCHES * shape.batch_size,
            drop_last=True,
        )


def hugging_face(
    dataset: PreparedDataset, shape: Shape, num_processes: int, folder: Path
) -> Iterator[Any]:
    """See the module."""
    import datasets

    paths = sorted({group.path for group in dataset.row_groups("train")})
    datasets.disable_progress_bars()
    data: Any = datasets.load_dataset(
        "parquet", data_files=paths, split="train", cache_dir=str(folder)
    )
    data = data.select_columns(COLUMNS).cast_column(IMAGE, datasets.Image(decode=False))
    data = data.with_format("arrow")
    loader: Any = DataLoader(
        data,
        batch_size=None,
        sampler=BatchSampler(RandomSampler(data), shape.batch_size, drop_last=True),
        collate_fn=Assemble(shape),
        num_workers=num_processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    while True:
        yield from loader


def streaming(
    dataset: PreparedDataset, shape: Shape, num_processes: int, folder: Path
) -> Iterator[Any]:
    """See the module."""
    from streaming import MDSWriter, StreamingDataset

    if not folder.exists():
        columns = dict.fromkeys(COLUMNS, "bytes")
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for group in dataset.row_groups("train"):
                table = read_row_group(group, COLUMNS)
                images = table.column(IMAGE).combine_chunks().field("bytes")
                for image, row in zip(images, text_rows(table), strict=True):
                    sample = {name: array.tobytes() for name, array in row.items()}
                    writer.write({IMAGE: image.as_py(), **sample})
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=shape.batch_size)
    loader: Any = DataLoader(
        data,
        batch_size=shape.batch_size,
        collate_fn=Assemble(shape).samples,
        num_workers=num_processes,
        multiprocessing_context="spawn",
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        yield from loader
