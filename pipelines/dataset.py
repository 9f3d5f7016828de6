"""Reads a prepared dataset: the manifest, rows of the Parquet files, pictures and text as arrays.

Only pyarrow, Pillow and simplejpeg are used, so that it works inside a Ray worker, a notebook or a test alike. Called by `train`,
`evaluate`, `sample` and the tests.
"""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipelines import storage
from pipelines.config import Config, UserError
from pipelines.schema import (
    IMAGE,
    MANIFEST,
    NO_ENCODER,
    NULL_TEXT,
    TEXT,
    TEXT_LENGTHS,
    Manifest,
)

_JPEG = b"\xff\xd8"
"""What a file of it begins with."""


class RowGroup(NamedTuple):
    """The smallest part of a split that is read at once: some hundred rows, a random sample of the split."""

    path: str
    "Absolute path of the Parquet file."
    row_group: int
    "Number of the group in its file."
    num_rows: int


@dataclass(frozen=True)
class PreparedDataset:
    """A finished dataset.

    Args:
        path: absolute path of its directory.
        manifest: what it holds.
    """

    path: str
    manifest: Manifest

    @classmethod
    def open(cls, path: str) -> Self:
        """Opens a dataset that `prepare` has finished.

        Raises:
            UserError: there is none, or its format is another.
        """
        absolute = storage.absolute(path)
        try:
            text = storage.read_bytes(storage.join(absolute, MANIFEST)).decode()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"dataset={path!r}: holds no finished dataset ({MANIFEST} is missing); "
                "run `layered prepare` first"
            ) from error
        try:
            return cls(absolute, Manifest.from_json(text))
        except ValueError as error:
            raise UserError(f"dataset={path!r}: {MANIFEST}: {error}") from error

    def check_matches(self, config: Config) -> None:
        """Refuses a dataset that was made for another model.

        Raises:
            UserError: naming the setting with the dataset's value and the configuration's.
        """
        made = self.manifest.settings
        if made.encoder == NO_ENCODER:
            raise UserError(
                f"dataset={self.path!r} was prepared without text; prepare another dataset=DIR "
                f"from it, with data.train_annotations={self.path}/train and a text.encoder"
            )
        wanted = {
            "text.encoder": (made.encoder, config.text.encoder),
            "text.max_tokens": (made.max_tokens, config.text.max_tokens),
            "model.text_width": (made.text_width, config.model.text_width),
        }
        for key, (have, want) in wanted.items():
            if have != want:
                raise UserError(
                    f"{key}: the configuration wants {want!r}, but dataset={self.path!r} was made "
                    f"with {have!r}; change one of them, or prepare another dataset=DIR"
                )
        top = config.model.resolutions[-1]
        if made.resolution < top or made.resolution % top:
            raise UserError(
                f"model.resolutions: the configuration wants {top!r}, or a multiple of it, but "
                f"dataset={self.path!r} was made with {made.resolution!r}; change one of them, or prepare another "
                "dataset=DIR"
            )

    def num_images(self, split: str) -> int:
        """Rows of a split."""
        return self.manifest.splits[split].counts.images

    def row_groups(self, split: str) -> list[RowGroup]:
        """All parts of a split, in order."""
        step = self.manifest.rows_per_group
        return [
            RowGroup(storage.join(self.path, file.path), number, min(step, file.rows - start))
            for file in self.manifest.splits[split].files
            for number, start in enumerate(range(0, file.rows, step))
        ]

    def read(
        self, split: str, columns: Sequence[str], rows: Sequence[int] | None = None
    ) -> pa.Table:
        """Reads rows of a split.

        Args:
            split: ``train`` or ``val``.
            columns: names of columns.
            rows: numbers of rows in the split's order, each below `num_images`; None for all.

        Returns:
            The rows in the order asked for.
        """
        groups = self.row_groups(split)
        if rows is None:
            tables = [read_row_group(group, columns) for group in groups]
            return pa.concat_tables([self._empty(split, columns), *tables])
        wanted = np.asarray(rows, dtype=np.int64)
        if any(not 0 <= row < self.num_images(split) for row in wanted):
            raise IndexError(f"{split} has {self.num_images(split)} rows")
        ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        of_row = np.searchsorted(ends, wanted, side="right")
        tables, places = [self._empty(split, columns)], [np.empty(0, dtype=np.int64)]
        for number in np.unique(of_row):
            place = np.flatnonzero(of_row == number)
            first = ends[number] - groups[number].num_rows
            tables.append(read_row_group(groups[number], columns).take(wanted[place] - first))
            places.append(place)
        return pa.concat_tables(tables).take(np.argsort(np.concatenate(places)))

    @functools.cached_property
    def null_text(self) -> NDArray[np.float16]:
        """Embedding [n, width] of the empty caption, for guidance."""
        content = storage.read_bytes(storage.join(self.path, NULL_TEXT))
        embedding: NDArray[np.float16] = np.load(io.BytesIO(content), allow_pickle=False)
        return embedding

    def _empty(self, split: str, columns: Sequence[str]) -> pa.Table:
        path = storage.join(self.path, self.manifest.splits[split].files[0].path)
        with storage.open_input(path) as file:
            return pq.read_schema(file).empty_table().select(list(columns))


def read_row_group(group: RowGroup, columns: Sequence[str]) -> pa.Table:
    """Reads some columns of one part of a split.

    Raises:
        UserError: the file is missing, or damaged as far as that can be seen.
    """
    try:
        with storage.open_input(group.path) as file:
            # Column chunks are fetched whole, not page by page: for an object store.
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
            table = parquet.read_row_group(group.row_group, columns=list(columns))
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{group.path}: row group {group.row_group} cannot be read: {error}; "
            "restore the file, or prepare the dataset again"
        ) from error
    if table.num_rows != group.num_rows:
        raise UserError(
            f"{group.path}: row group {group.row_group} has {table.num_rows} rows, and "
            f"{MANIFEST} says {group.num_rows}; the file is of another dataset"
        )
    return table


def decode_rows(table: pa.Table) -> NDArray[np.uint8]:
    """Decodes the ``image`` column to pixels [rows, resolution, resolution, 3], sRGB."""
    encoded = table.column(IMAGE).combine_chunks().field("bytes")
    return np.stack([pixels(content.as_buffer()) for content in encoded])


def pixels(encoded: pa.Buffer, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decodes one picture to pixels [resolution, resolution, 3], sRGB.

    JPEG by libjpeg-turbo itself: the pixels are Pillow's, without its copies, and damage is an error instead of a grey half.

    Args:
        encoded: content of the picture's file.
        out: where to put them; a new array for None.

    Raises:
        Exception: of many kinds, where it is not a whole picture, or not of the size of ``out``.
    """
    content = np.frombuffer(encoded, dtype=np.uint8)
    decoded: NDArray[np.uint8]
    if bytes(content[:2]) == _JPEG:
        decoded = simplejpeg.decode_jpeg(content, fastdct=False, fastupsample=False, buffer=out)
    else:
        with Image.open(pa.BufferReader(encoded)) as picture:
            decoded = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    if out is None:
        return decoded
    if decoded.shape != out.shape:
        height, width = decoded.shape[:2]
        raise ValueError(
            f"it has {width} x {height} pixels and not {out.shape[1]} x {out.shape[0]}"
        )
    if not np.may_share_memory(decoded, out):
        out[...] = decoded
    return out


def text_rows(table: pa.Table) -> Iterator[dict[str, NDArray[Any]]]:
    """Iterates over ``text`` and ``text_lengths`` of a table as arrays, without copying; for `text_of`."""
    columns = {name: table.column(name).combine_chunks() for name in (TEXT, TEXT_LENGTHS)}
    for row in range(table.num_rows):
        yield {name: column[row].values.to_numpy() for name, column in columns.items()}


def text_of(row: Mapping[str, Any], caption_index: int) -> NDArray[np.float16]:
    """Embedding [tokens, width] of one caption of a row.

    Args:
        row: ``text`` (flat float16 array) and ``text_lengths`` of one row, from `text_rows` or one of Ray's batches.
        caption_index: which of the row's captions.
    """
    lengths = np.asarray(row[TEXT_LENGTHS], dtype=np.int64)
    num_tokens = int(lengths.sum())  # none, of a dataset without text
    flat = np.asarray(row[TEXT], dtype=np.float16).reshape(num_tokens, -1 if num_tokens else 1)
    start = int(lengths[:caption_index].sum())
    return flat[start : start + int(lengths[caption_index])]
