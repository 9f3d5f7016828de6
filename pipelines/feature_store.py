"""Features of many pictures, kept as Parquet files that are made one by one and in any order.

A store is one directory for one kind of pictures at one resolution. Picture i of N lies in shard i // `SHARD_IMAGES`, file
``00000.parquet`` and so on, whose rows are in the order of the pictures:

    index     int64                          number of the picture, from 0
    features  fixed_size_list<float32>[dim]  as the extractor gave them
    logits    fixed_size_list<float32>[c]    absent where the extractor has no classes

The files' metadata hold, under `OUR_METADATA`, a JSON object with everything that decides the content. A shard depends on that
and its number alone and appears whole or not at all, so it does not matter who makes it, or that one is made twice: a job that
is killed and begun again makes `missing` and nothing else. What is read is checked against all of it.

Of 30,000 pictures 2048 features and 1008 logits take 367 MB, and from them come the scores that statistics cannot give (KID,
precision, the limit of the distance) and the nearest training pictures. Called by `folders`,
`extraction` and `scoring`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy import ndarray

from pipelines import storage
from pipelines.errors import UserError
from pipelines.metrics import FeatureStatistics
from pipelines.schema import OUR_METADATA, ours_of

SHARD_IMAGES = 128
"""Pictures of a shard, the last of which may have fewer: what a kill costs at most, for each who was at work."""
STATISTICS_SHARDS = 8
"""Shards whose statistics are taken at once."""

INDEX, FEATURES, LOGITS = "index", "features", "logits"


@dataclass(frozen=True, slots=True)
class Contents:
    """Features, and logits where there are any, of consecutive pictures."""

    features: Float[ndarray, "n d"]
    logits: Float[ndarray, "n classes"] | None

    @classmethod
    def join(cls, parts: Sequence["Contents"]) -> "Contents":
        """Return one after the other, of at least one."""
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            np.concatenate([part.features for part in parts]),
            np.concatenate(logits) if logits else None,
        )

    def statistics(self) -> FeatureStatistics:
        """Statistics of the features; those of a whole store are the store's own, to the bit."""
        size = STATISTICS_SHARDS * SHARD_IMAGES
        starts = range(0, len(self.features), size)
        return FeatureStatistics.from_blocks(
            self.features[start : start + size] for start in starts
        )


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """Where features are, or will be.

    Args:
        path: absolute, of the directory.
        num_images: pictures in all.
        dim: features of a picture.
        num_classes: logits of a picture; 0 for none.
        settings: everything else that decides the features: extractor, weights, resize, pictures. Values of JSON.
    """

    path: str
    num_images: int
    dim: int
    num_classes: int
    settings: dict[str, Any]

    @property
    def num_shards(self) -> int:
        """Files of the finished store."""
        return -(-self.num_images // SHARD_IMAGES)

    def images(self, shard: int) -> range:
        """Numbers of a shard's pictures."""
        first = shard * SHARD_IMAGES
        return range(first, min(first + SHARD_IMAGES, self.num_images))

    def file(self, shard: int) -> str:
        """Path of a shard."""
        return storage.join(self.path, f"{shard:05d}.parquet")

    def missing(self) -> list[int]:
        """Shards that are not there; what is there is looked at when it is read."""
        there = set(storage.list_directory(self.path))
        return [shard for shard in range(self.num_shards) if _name(self.file(shard)) not in there]

    def write(self, shard: int, contents: Contents) -> None:
        """Write a shard; one that is there is replaced.

        Raises:
            ValueError: the arrays are not of the shard's and the store's sizes, or a value is not finite.
            OSError: the file cannot be written.
        """
        images = self.images(shard)
        columns: dict[str, Any] = {INDEX: np.arange(images.start, images.stop)}
        for name, width, values in self._parts(contents):
            if values is None or values.shape != (len(images), width):
                shape = None if values is None else values.shape
                raise ValueError(
                    f"{name} of shard {shard} must have shape {(len(images), width)}, not {shape}"
                )
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
                raise ValueError(f"{name} of picture {images[row]} are not finite")
            flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, width)
        table = pa.table(columns).replace_schema_metadata(
            {OUR_METADATA: json.dumps(self._about(), sort_keys=True)}
        )
        buffer = pa.BufferOutputStream()
        # Floats of a network hardly compress.
        pq.write_table(
            table, buffer, compression="none", use_dictionary=False, write_page_checksum=True
        )
        storage.write_atomically(self.file(shard), memoryview(buffer.getvalue()))

    def read(self, shard: int) -> Contents:
        """Read a shard.

        Raises:
            UserError: the file is missing, damaged, or of other settings.
        """
        return next(self._read(range(shard, shard + 1)))

    def _contents(self, shard: int, content: bytes | OSError) -> Contents:
        """What a shard's file holds, read or not."""
        path = self.file(shard)
        try:
            if isinstance(content, OSError):
                raise content
            # Whole, and in this thread: `read_table` of a Python file with damaged pages may end the process.
            with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
                table = file.read()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read: {error}; delete it, and the same command makes it again"
            ) from error
        made = ours_of(table.schema)
        if made != self._about():
            names = [key for key, value in self._about().items() if made.get(key) != value]
            raise UserError(
                f"{path}: holds features of other {', '.join(names)}; delete {self.path}"
            )
        images = self.images(shard)
        if table.column(INDEX).to_pylist() != list(images):
            raise UserError(f"{path}: does not hold pictures {images.start} to {images.stop - 1}")
        parts = (_matrix(table, name, width) for name, width, _ in self._parts(None))
        return Contents(*parts, *[None] * (not self.num_classes))

    def shards(self) -> Iterator[Contents]:
        """All shards, in order; those that come next are read meanwhile."""
        return self._read(range(self.num_shards))

    def _read(self, shards: range) -> Iterator[Contents]:
        contents = storage.read_each([self.file(shard) for shard in shards])
        return map(self._contents, shards, contents)

    def read_first(self, num_images: int) -> Contents:
        """The first pictures, or all if there are fewer; raises as `read`."""
        shards = range(min(self.num_shards, -(-num_images // SHARD_IMAGES)))
        found = Contents.join(list(self._read(shards)))
        logits = None if found.logits is None else found.logits[:num_images]
        return Contents(found.features[:num_images], logits)

    def read_all(self) -> Contents:
        """All pictures.

        Raises:
            UserError: as `read`.
        """
        return self.read_first(self.num_images)

    def statistics(self) -> FeatureStatistics:
        """Statistics of all features, shard by shard in order: the same to the bit whoever made them, in flat memory."""
        groups = _groups(self.shards(), STATISTICS_SHARDS)
        return FeatureStatistics.from_blocks(Contents.join(parts).features for parts in groups)

    def _about(self) -> dict[str, Any]:
        about = dataclasses.asdict(self) | {"shard_images": SHARD_IMAGES}
        del about["path"]
        normal: dict[str, Any] = json.loads(json.dumps(about))
        return normal

    def _parts(self, contents: Contents | None) -> list[tuple[str, int, ndarray | None]]:
        """Name, width and values of each column of floats."""
        features, logits = (contents.features, contents.logits) if contents else (None, None)
        both = [(FEATURES, self.dim, features), (LOGITS, self.num_classes, logits)]
        return both if self.num_classes else both[:1]


def _groups(items: Iterable[Contents], size: int) -> Iterator[list[Contents]]:
    """So many at a time, and the rest."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _matrix(table: pa.Table, name: str, width: int) -> Float[ndarray, "n width"]:
    values: ndarray = table.column(name).combine_chunks().flatten().to_numpy()
    return values.reshape(-1, width)
