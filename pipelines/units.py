"""The work of `prepare` in Ray's workers. One unit is one Parquet file: it comes as one row and leaves as one row.

    row {split, index, entries}  --decode_unit, a task-->  + {table, rejects, counts}
                                 --EncodeAndWrite, an actor-->  {split, index, file}

So however Ray Data splits, merges or orders its blocks, a file holds the same bytes, and it appears with one atomic
write after its rejects: a file that is there is finished. Entries and tables travel in Arrow's stream format, as bytes.
This module is loaded in every worker and imports torch only where text is encoded.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipelines import pictures, schema, storage
from pipelines.annotations import shuffle_key
from pipelines.schema import Counts, DataFile, Settings
from pipelines.sources import Row, Source

Tokens = NDArray[np.float16]
"""Embedding [tokens, width] of a caption."""

Encode = Callable[[Sequence[str]], tuple[list[Tokens], list[bool]]]
"""Captions to their tokens and whether each was cut."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """Why a picture is not in the dataset."""

    stage: str
    error: str


def decode_unit(row: Row, *, sources: Mapping[str, Source | None], settings: Settings) -> Row:
    """Reads, crops, resizes and encodes the pictures of a unit.

    Args:
        row: ``split``, ``index``, ``entries``.
        sources: split -> what reads its pictures.
        settings: of the dataset.

    Returns:
        ``split``, ``index``, ``table`` (all columns but text), ``rejects``, ``counts``.
    """
    Image.MAX_IMAGE_PIXELS = None  # `Settings.max_pixels` takes the place of Pillow's own limit
    entries = _from_bytes(row["entries"]).to_pylist()
    entries.sort(key=lambda entry: shuffle_key(entry["image_id"]))
    results = _pictures(sources[row["split"]], entries, settings)
    rows, rejects, num_empty = [], [], 0
    for entry, result in zip(entries, results, strict=True):
        about = {key: entry[key] for key in ("image_id", "file_name")}
        if isinstance(result, Reject):
            rejects.append(about | dataclasses.asdict(result))
        else:
            rows.append(about | result | {key: entry[key] for key in ("captions", "caption_ids")})
            num_empty += entry["num_empty"]
    counts = Counts(
        images=len(rows),
        rejects=len(rejects),
        captions=sum(len(one["captions"]) for one in rows),
        empty_captions=num_empty,
    )
    names = [name for name in schema.arrow_schema({}).names if not name.startswith(schema.TEXT)]
    part = pa.schema([schema.arrow_schema({}).field(name) for name in names])
    return {
        "split": row["split"],
        "index": row["index"],
        "table": to_bytes(pa.Table.from_pylist(rows, schema=part)),
        "rejects": to_bytes(pa.Table.from_pylist(rejects, schema=schema.REJECTS)),
        "counts": json.dumps(dataclasses.asdict(counts)),
    }


def _pictures(
    source: Source | None, entries: Sequence[Row], settings: Settings
) -> list[Row | Reject]:
    """Columns of each picture, or why there are none."""
    results: dict[int, Row | Reject] = {
        index: Reject(stage="index", error=entry["error"])
        for index, entry in enumerate(entries)
        if entry["error"] is not None
    }
    usable = [index for index in range(len(entries)) if index not in results]
    if source is not None:
        for number, content in source.read([entries[index] for index in usable]):
            index = usable[number]
            results[index] = (
                Reject(stage="read", error=_reason(content))
                if isinstance(content, OSError)
                else _picture(entries[index], content, settings)
            )
    return [results[index] for index in range(len(entries))]


def write_unit(
    row: Row, *, dataset: str, fingerprint: str, settings: Settings, encode: Encode
) -> Row:
    """Adds the text of a unit and writes its files.

    Args:
        row: what `decode_unit` returned.
        dataset: absolute path of the dataset's directory.
        fingerprint: of the settings, put into every file.
        settings: of the dataset.
        encode: turns captions into tokens.

    Returns:
        ``split``, ``index`` and ``file``: JSON of the written `DataFile` and its `Counts`.
    """

    def write(path: str, content: bytes | memoryview) -> None:
        storage.write_atomically(storage.join(dataset, path), content)

    split, index = row["split"], row["index"]
    if (split, index) == (schema.SPLITS[0], 0):
        (null_text,), _ = encode([""])
        write(schema.NULL_TEXT, _npy(null_text.reshape(-1, settings.text_width)))
    table, rejects = _from_bytes(row["table"]), _from_bytes(row["rejects"])
    table, num_truncated = _with_text(table, encode, settings.text_width)
    counts = Counts(
        **json.loads(row["counts"])
        | {"tokens": _num_tokens(table), "truncated_captions": num_truncated}
    )
    if rejects.num_rows:
        write(schema.rejects_file(split, index), _parquet(rejects))
    path = schema.data_file(split, index)
    ours = {
        "fingerprint": fingerprint,
        "resolution": settings.resolution,
        "text_width": settings.text_width,
        "counts": dataclasses.asdict(counts),
    }
    content = _parquet(table.cast(schema.arrow_schema(ours)))
    write(path, content)
    file = DataFile(path=path, rows=table.num_rows, bytes=len(content))
    return {"split": split, "index": index, "file": finished_to_json(file, counts)}


def no_text(captions: Sequence[str]) -> tuple[list[Tokens], list[bool]]:
    """The `Encode` of a dataset without text: no tokens."""
    return [np.empty((0, 1), dtype=np.float16)] * len(captions), [False] * len(captions)


class EncodeAndWrite:
    """`write_unit` in an actor that holds the text encoder.

    Args:
        dataset: as `write_unit`.
        fingerprint: as `write_unit`.
        settings: as `write_unit`.
        device: where the encoder computes.
    """

    def __init__(self, dataset: str, fingerprint: str, settings: Settings, device: str) -> None:
        import torch

        from layered_model.text import TextEncoder, commit_of

        # Sums depend on the number of threads; several encoders use more cores better than one with many threads.
        torch.set_num_threads(1)
        self.batch_size = settings.encoder_batch_size
        self.encoder = TextEncoder.from_pretrained(
            settings.encoder,
            revision=commit_of(settings.encoder_weights),
            max_tokens=settings.max_tokens,
            device=device,
            dtype=getattr(torch, settings.encoder_precision),
        )
        self.write = functools.partial(
            write_unit,
            dataset=dataset,
            fingerprint=fingerprint,
            settings=settings,
            encode=self.encode,
        )

    def __call__(self, row: Row) -> Row:
        """Encodes and writes one unit; see `write_unit`."""
        return self.write(row)

    def encode(self, captions: Sequence[str]) -> tuple[list[Tokens], list[bool]]:
        """Tokens of each caption, and whether it was cut."""
        encoded = self.encoder.encode(captions, self.batch_size)
        return [tokens.numpy() for tokens in encoded.tokens], encoded.truncated


def _with_text(table: pa.Table, encode: Encode, width: int) -> tuple[pa.Table, int]:
    """Appends ``text`` and ``text_lengths``; also returns how many captions were cut.

    A row group at a time, so that its tokens are there once more only for that time.
    """
    texts, lengths, num_truncated = [], [], 0
    kinds = [schema.arrow_schema({}).field(name).type for name in schema.TEXT_COLUMNS]
    for start in range(0, table.num_rows, schema.ROWS_PER_GROUP):
        part = table.slice(start, schema.ROWS_PER_GROUP)
        captions = part.column(schema.CAPTIONS).combine_chunks()
        offsets = captions.offsets.to_numpy() - captions.offsets[0].as_py()
        encoded, truncated = encode(captions.flatten().to_pylist())
        counts = np.array([len(tokens) for tokens in encoded], dtype=np.int32)
        flat = np.concatenate([tokens.ravel() for tokens in encoded])
        ends = np.concatenate([[0], np.cumsum(counts)])[offsets] * width
        ends, offsets = (pa.array(array, pa.int32()) for array in (ends, offsets))
        texts.append(pa.ListArray.from_arrays(ends, pa.array(flat), type=kinds[0]))
        lengths.append(pa.ListArray.from_arrays(offsets, pa.array(counts), type=kinds[1]))
        num_truncated += sum(truncated)
    for name, kind, chunks in zip(schema.TEXT_COLUMNS, kinds, (texts, lengths), strict=True):
        table = table.append_column(name, pa.chunked_array(chunks, kind))
    return table, num_truncated


def _num_tokens(table: pa.Table) -> int:
    return int(pc.sum(pc.list_flatten(table.column(schema.TEXT_LENGTHS))).as_py() or 0)


def finished_to_json(file: DataFile, counts: Counts) -> str:
    """For the way through Ray Data."""
    return json.dumps([dataclasses.asdict(file), dataclasses.asdict(counts)])


def finished_from_json(text: str) -> tuple[DataFile, Counts]:
    """Reads what `finished_to_json` wrote."""
    file, counts = json.loads(text)
    return DataFile(**file), Counts(**counts)


def find_finished(
    dataset: str, fingerprint: str, split: str, index: int
) -> tuple[DataFile, Counts] | None:
    """Returns the file of a unit if an earlier run with the same settings wrote it."""
    path = schema.data_file(split, index)
    try:
        with storage.open_input(storage.join(dataset, path)) as opened:
            parquet = pq.ParquetFile(opened)
            ours = schema.ours_of(parquet.schema_arrow)
            rows, size = parquet.metadata.num_rows, opened.seek(0, io.SEEK_END)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    if ours.get("fingerprint") != fingerprint:
        return None
    return DataFile(path=path, rows=rows, bytes=size), Counts(**ours["counts"])


def _picture(entry: Row, content: bytes, settings: Settings) -> Row | Reject:
    """Columns of one picture, or why there are none."""
    place = None
    if settings.crop == "random":
        digest = hashlib.sha256(f"crop {entry['image_id']}".encode()).digest()
        place = int.from_bytes(digest[:8], "big")
    try:
        square = pictures.make_square(
            content,
            resolution=settings.resolution,
            place=place,
            image_format=settings.image_format,
            quality=settings.image_quality,
            max_pixels=settings.max_pixels,
        )
    except (
        Exception
    ) as error:  # Pillow raises nearly everything, and one bad picture must not stop the others
        return Reject(stage="decode", error=_reason(error))
    image = {"bytes": square.content, "path": entry["file_name"]}
    return {"width": square.width, "height": square.height, "image": image}


def _reason(error: Exception) -> str:
    """One line without paths or addresses, so that it is the same on every machine."""
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    text = str(error).partition("\n")[0].partition(" <_io")[0]
    return f"{type(error).__name__}: {text}"


def to_bytes(table: pa.Table) -> bytes:
    """A table for the way through Ray Data."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_bytes(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _parquet(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=schema.ROWS_PER_GROUP,
        # Pictures are compressed already, and what else there is is small.
        compression={f"{schema.TEXT}.list.element": "zstd"},
        use_dictionary=False,
        write_statistics=[schema.IMAGE_ID],
        # A flipped bit is an error of the reader's, not another picture.
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
