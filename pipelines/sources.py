"""Where pictures and captions come from: one small interface, and three sources behind it.

    CocoCaptions   a .json file of COCO's form, and a folder with the pictures it names
    ParquetRows    a .parquet file or a folder of them, a row a picture; what `prepare` writes is read as it is
    TextFiles      a folder of pictures, each with a .txt beside it, a caption a line

A source lists its pictures once, in the process that runs `prepare`, and reads pictures of that list in Ray's workers, to
which it travels. All paths may be local or ``s3://``. Called by `prepare` and `units`.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import annotations, storage
from pipelines.annotations import Entry, Listing, make_entry
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.sections import DataConfig  # imports torch, which workers that decode do without

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
"""Names of pictures in a folder end so, in small or capital letters."""

CAPTION_IDS = "caption_ids"
"""Column of our own files, from which captions keep their ids."""

ROWS_AT_ONCE = 64
"""Rows of a Parquet file whose pictures are in memory together."""

Row = dict[str, Any]


class Source(Protocol):
    """Pictures with captions."""

    def listing(self) -> Listing:
        """Every picture, in the order in which they are cut into files.

        Raises:
            UserError: the source is missing or has another form.
        """

    def read(self, entries: Sequence[Row]) -> Iterator[tuple[int, bytes | OSError]]:
        """Reads pictures.

        Args:
            entries: rows of the list.

        Yields:
            Index into ``entries``, and the picture's file or why it cannot be read; each index once, in any order.

        Raises:
            OSError: a fault that is not one picture's, such as a lost connection.
        """


def open_source(data: "DataConfig", split: str) -> Source | None:
    """The source that ``data.<split>_annotations`` and ``data.<split>_images`` name, or None where neither is given.

    Raises:
        UserError: they name nothing that is there.
    """
    key, images_key = f"data.{split}_annotations", f"data.{split}_images"
    listed, images = getattr(data, f"{split}_annotations"), getattr(data, f"{split}_images")
    if images is not None:
        images = storage.absolute(images)
        if not storage.is_directory(images):
            raise UserError(f"{images_key}={images!r}: there is no such folder")
    if listed is None:
        return None if images is None else TextFiles(images=images, key=images_key)
    path = storage.absolute(listed)
    if path.endswith(".json"):
        if images is None:
            raise UserError(f"{images_key}=None: {key}={path!r} names pictures; give their folder")
        return CocoCaptions(path=path, images=images, key=key)
    files = _parquet_files(path)
    if not files:
        raise UserError(
            f"{key}={path!r}: there is no such file; it must be a .json of COCO's form, a .parquet "
            "file or a folder of them, or null for a folder of pictures with .txt beside them"
        )
    return ParquetRows(
        files=files,
        images=images,
        image_column=data.image_column,
        caption_column=data.caption_column,
        id_column=data.id_column,
        key=key,
    )


@dataclass(frozen=True, kw_only=True)
class CocoCaptions:
    """Captions in COCO's form, and the folder of pictures."""

    path: str
    images: str
    key: str
    "The configuration's key that gave ``path``, for messages."

    def listing(self) -> Listing:
        """Every picture, in the order of a hash of its id."""
        where = f"{self.key}={self.path!r}"
        try:
            content = storage.read_bytes(self.path)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}") from error
        entries, num_strays = annotations.parse_coco(content, where)
        return Listing(
            entries=_shuffled(entries),
            sha256=hashlib.sha256(content).hexdigest(),
            num_strays=num_strays,
        )

    def read(self, entries: Sequence[Row]) -> Iterator[tuple[int, bytes | OSError]]:
        """Reads pictures, in order."""
        return _read_files(self.images, entries)


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """A folder of pictures, also in folders below it: ``a/b.jpg`` has its captions in ``a/b.txt``, one a line."""

    images: str
    key: str

    def listing(self) -> Listing:
        """Every picture, in the order of a hash of its id, which is a hash of its name."""
        files = storage.walk(self.images)
        names = [name for name in files if name.lower().endswith(PICTURES)]
        if not names:
            raise UserError(f"{self.key}={self.images!r}: holds no picture ({', '.join(PICTURES)})")
        texts = {name for name in files if name.endswith(".txt")}
        stems = [name.rpartition(".")[0] for name in names]
        read = storage.read_each(
            [storage.join(self.images, f"{stem}.txt") for stem in stems if f"{stem}.txt" in texts]
        )
        entries, next_id = [], itertools.count()
        for name, stem in zip(names, stems, strict=True):
            text = next(read) if f"{stem}.txt" in texts else None
            entries.append(_of_text_file(name, text, next_id))
        entries = [*annotations.once_each(entries)]
        return Listing(entries=_shuffled(entries), sha256=_hash(entries))

    def read(self, entries: Sequence[Row]) -> Iterator[tuple[int, bytes | OSError]]:
        """Reads pictures, in order."""
        return _read_files(self.images, entries)


@dataclass(frozen=True, kw_only=True)
class ParquetRows:
    """Parquet files with a row a picture."""

    files: tuple[str, ...]
    images: str | None
    "Folder of pictures that the rows only name."
    image_column: str
    caption_column: str
    id_column: str | None
    key: str

    def listing(self) -> Listing:
        """Every row, group by group in the order of a hash, so that what is cut into one file lies together."""
        entries: list[Entry] = []
        sizes, next_id = [], itertools.count()
        for number, path in enumerate(self.files):
            with storage.open_input(path) as file:
                try:
                    parquet = pq.ParquetFile(file)
                except pa.ArrowInvalid as error:
                    raise UserError(f"{self.key}={path!r}: not a Parquet file: {error}") from error
                columns = self._columns(parquet.schema_arrow, path)
                for group in range(parquet.num_row_groups):
                    sizes.append(parquet.metadata.row_group(group).total_byte_size)
                    rows = parquet.read_row_group(group, columns=columns).to_pylist()
                    for index, row in enumerate(rows):
                        place = (number, group, index)
                        entries.append(self._entry(row, place, len(entries), next_id))
        entries = list(annotations.once_each(entries))
        digest = _hash(entries, self.image_column, sizes)
        # Group by group, since a row group is read from its start; which group is next, a hash decides.
        entries.sort(key=lambda entry: (_group_key(entry.place), entry.place))
        return Listing(entries=annotations.to_table(entries), sha256=digest)

    def read(self, entries: Sequence[Row]) -> Iterator[tuple[int, bytes | OSError]]:
        """Reads pictures in the order in which they lie in the files."""
        order = sorted(range(len(entries)), key=lambda index: entries[index]["place"])
        for (number, group), indices in itertools.groupby(
            order, lambda index: entries[index]["place"][:2]
        ):
            wanted = [(entries[index]["place"][2], index) for index in indices]
            with storage.open_input(self.files[number]) as file:
                yield from self._read_group(pq.ParquetFile(file), group, wanted)

    def _read_group(
        self, parquet: pq.ParquetFile, group: int, wanted: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, bytes | OSError]]:
        """Pictures of a row group, of which only some are in memory at once; ``wanted`` is rows and indices, in order."""
        batches = parquet.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=[self.image_column]
        )
        first, waiting = 0, collections.deque(wanted)
        while waiting:
            batch = next(batches).column(0)
            while waiting and waiting[0][0] < first + len(batch):
                row, index = waiting.popleft()
                yield index, self._picture(batch[row - first].as_py())
            first += len(batch)

    def _picture(self, value: bytes | str | dict[str, Any] | None) -> bytes | OSError:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and self.images is not None:
            return next(storage.read_each([storage.join(self.images, value)]))
        return value if isinstance(value, bytes) else FileNotFoundError("the row has no picture")

    def _entry(self, row: Row, place: tuple[int, int, int], number: int, next_id: Any) -> Entry:
        image_id = row[self.id_column] if self.id_column else number
        if image_id is None:
            raise UserError(
                f"data.id_column={self.id_column!r}: {self.files[place[0]]!r} has a row without one"
            )
        value, captions = row[self.caption_column], []
        if value is not None:
            captions = [text or "" for text in ([value] if isinstance(value, str) else value)]
        ids = row.get(CAPTION_IDS) or [next(next_id) for _ in captions]
        image = row.get(self.image_column)
        name = image.get("path") if isinstance(image, dict) else image
        if name is None:
            name = f"{self.files[place[0]].rpartition('/')[2]}:{place[1]}:{place[2]}"
        return make_entry(image_id, name, list(zip(ids, captions, strict=True)), place)

    def _columns(self, schema: pa.Schema, path: str) -> list[str]:
        """Names of what `listing` reads, among them the picture's name but not its content."""
        self._check(schema, "caption_column", _is_captions, "a text or a list of texts", path)
        self._check(schema, "image_column", _is_image, "bytes, or a struct with bytes", path)
        columns = [self.caption_column]
        if self.id_column is not None:
            self._check(schema, "id_column", pa.types.is_integer, "integers, or null", path)
            columns.append(self.id_column)
        if pa.types.is_struct(kind := schema.field(self.image_column).type):
            columns += [f"{self.image_column}.path"] if kind.get_field_index("path") >= 0 else []
        elif _is_text(kind):
            columns.append(self.image_column)
        has_ids = CAPTION_IDS in schema.names and schema.field(CAPTION_IDS).type == _IDS
        return [*columns, *([CAPTION_IDS] if has_ids else [])]

    def _check(
        self,
        schema: pa.Schema,
        key: str,
        fits: Callable[[pa.DataType], bool],
        wanted: str,
        path: str,
    ) -> None:
        name = getattr(self, key)
        if name not in schema.names:
            raise UserError(
                f"data.{key}={name!r}: {path!r} has no such column; it has "
                f"{', '.join(schema.names)}"
            )
        if not fits(kind := schema.field(name).type):
            raise UserError(f"data.{key}={name!r}: {path!r} has {kind} there, not {wanted}")


_IDS = pa.list_(pa.int64())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_captions(kind: pa.DataType) -> bool:
    in_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind.value_type if in_list else kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return _is_text(kind) or bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parquet_files(path: str) -> tuple[str, ...]:
    """The file itself, or the Parquet files of a folder in order of their names."""
    if path.endswith(".parquet"):
        return (path,) if storage.exists(path) else ()
    names = (name for name in storage.list_directory(path) if name.endswith(".parquet"))
    return tuple(storage.join(path, name) for name in names)


def _of_text_file(name: str, text: bytes | OSError | None, next_id: Iterator[int]) -> Entry:
    """The entry of a picture whose .txt holds ``text``; None if there is no .txt."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    image_id = int.from_bytes(digest[:8], "big") >> 1
    try:
        if not isinstance(text, bytes):
            raise ValueError("it has no .txt beside it" if text is None else "its .txt is gone")
        lines = text.decode("utf-8-sig").splitlines()
    except ValueError as error:
        reason = "its .txt is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        return Entry(image_id=image_id, file_name=name, error=reason)
    return make_entry(image_id, name, [(next(next_id), line) for line in lines])


def _group_key(place: tuple[int, ...]) -> bytes:
    return hashlib.sha256(str(place[:2]).encode()).digest()


def _read_files(folder: str, entries: Sequence[Row]) -> Iterator[tuple[int, bytes | OSError]]:
    return enumerate(
        storage.read_each([storage.join(folder, entry["file_name"]) for entry in entries])
    )


def _shuffled(entries: Sequence[Entry]) -> pa.Table:
    return annotations.to_table(
        sorted(entries, key=lambda entry: annotations.shuffle_key(entry.image_id))
    )


def _hash(entries: Sequence[Entry], *others: object) -> str:
    digest = hashlib.sha256(json.dumps(others).encode())
    for entry in entries:
        digest.update(json.dumps(dataclasses.astuple(entry)).encode())
    return digest.hexdigest()
