"""``layered inspect``: what a prepared dataset holds, for a person; with ``--check``, whether all of it is as the manifest says.

Reads with pyarrow alone, a thread a core, and starts no Ray. The numbers come from the manifest and from the small columns; only
a check reads everything.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from pipelines import grid, schema, storage
from pipelines.config import UserError, fingerprint
from pipelines.dataset import PreparedDataset, RowGroup, pixels, read_row_group
from pipelines.schema import NO_ENCODER, Counts, DataFile

THREADS = len(os.sched_getaffinity(0))
MAX_REASONS = 10
"""Kinds of rejects that are listed."""
MAX_PROBLEMS = 5
"""Of one file, that a check tells of."""
BAR = 48
"""Characters of the longest bar of the histogram."""
TILE = 128
"""Pixels of a side on the contact sheet, at most."""
BLOCKS = 4
"""Columns of the contact sheet."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked for."""

    dataset: str
    sheet: str | None
    "Where the contact sheet is written; None for nowhere."
    num_images: int
    "On the contact sheet, at most."
    check: bool

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"--num-images {self.num_images} must be at least 1")


def run(settings: Settings) -> int:
    """Prints what a dataset holds, writes a contact sheet, checks.

    Returns:
        The exit code: 1 where a check found something.

    Raises:
        UserError: there is no finished dataset, or what is to be shown of it cannot be read.
    """
    dataset = PreparedDataset.open(settings.dataset)
    for line in _about(dataset):
        sys.stdout.write(line + "\n")
    try:
        for line in (*_rejects(dataset), *_lengths(dataset)):
            sys.stdout.write(line + "\n")
        if settings.sheet is not None:
            _draw_sheet(dataset, settings.sheet, settings.num_images)
            sys.stdout.write(f"\npictures: {settings.sheet}\n")
    except UserError:
        if not settings.check:  # which tells of all that cannot be read, and of this
            raise
    if not settings.check:
        return 0
    problems = check(dataset)
    for problem in problems:
        sys.stdout.write(problem + "\n")
    sys.stdout.write(f"\nchecked: {len(problems)} problems\n" if problems else "\nchecked: sound\n")
    return 1 if problems else 0


def _about(dataset: PreparedDataset) -> Iterator[str]:
    """Settings, and a table of counts."""
    manifest = dataset.manifest
    made = manifest.settings
    quality = "" if made.image_quality is None else f" of quality {made.image_quality}"
    yield f"dataset   {dataset.path}, fingerprint {manifest.fingerprint}"
    yield f"pictures  {made.resolution} x {made.resolution}, {made.image_format}{quality}, crop {made.crop}"
    if made.encoder == NO_ENCODER:
        yield "text      not encoded"
    else:
        yield (
            f"text      {made.encoder}, {made.encoder_precision}, weights {made.encoder_weights}; width "
            f"{made.text_width}, at most {made.max_tokens} tokens"
        )
    yield ""
    names = list(asdict(Counts()))
    yield "split" + "".join(f"{name.replace('_', ' '):>20}" for name in (*names, "files", "MB"))
    for name, split in manifest.splits.items():
        size = sum(file.bytes for file in split.files) / 1e6
        cells = [*asdict(split.counts).values(), len(split.files), round(size, 1)]
        yield f"{name:5}" + "".join(f"{cell:>20,}" for cell in cells)
    yield ""
    for name, split in manifest.splits.items():
        room = split.text_size
        if room.padded_bytes_per_caption and split.counts.captions:
            share = room.bytes_per_caption / room.padded_bytes_per_caption
            yield (
                f"{name:5} text takes {room.bytes_per_caption / 1e3:.1f} kB a caption, {share:.2f} of what "
                "it would take padded"
            )


def _rejects(dataset: PreparedDataset) -> Iterator[str]:
    """The most frequent reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    for table in _each(_reject_files(dataset), lambda path: _read(dataset, path)):
        counts.update(zip(table["stage"].to_pylist(), table["error"].to_pylist(), strict=True))
    for (stage, error), count in counts.most_common(MAX_REASONS):
        yield f"rejects   {count:,} x {stage}: {error}"
    if len(counts) > MAX_REASONS:
        yield f"rejects   and {len(counts) - MAX_REASONS} other reasons, in {schema.REJECTS_FOLDER}/"


def _lengths(dataset: PreparedDataset) -> Iterator[str]:
    """A histogram of captions, by tokens or, where there are none, by words."""
    words = dataset.manifest.settings.encoder == NO_ENCODER
    column = schema.CAPTIONS if words else schema.TEXT_LENGTHS
    files = [file.path for split in dataset.manifest.splits.values() for file in split.files]
    found: Counter[int] = Counter()
    for table in _each(files, lambda path: _read(dataset, path, [column])):
        values = pc.list_flatten(table[column])
        if words:
            values = pc.list_value_length(pc.split_pattern(values, " "))
        for entry in pc.value_counts(values).to_pylist():
            found[entry["values"]] += entry["counts"]
    if not found:
        return
    most = max(found.values())
    yield f"\ncaptions by {'words' if words else 'tokens'}"
    for length in range(min(found), max(found) + 1):
        count = found[length]
        yield f"{length:5} {count:>9,} {'#' * -(-BAR * count // most)}"


def _draw_sheet(dataset: PreparedDataset, path: str, num_images: int) -> None:
    """Pictures from all over the first split that has any, with their first captions."""
    sizes = {name: split.counts.images for name, split in dataset.manifest.splits.items()}
    split = next((name for name, size in sizes.items() if size), None)
    if split is None:
        raise UserError(f"dataset={dataset.path!r} has no pictures to show")
    num_images = min(num_images, sizes[split])
    rows = [index * sizes[split] // num_images for index in range(num_images)]
    table = dataset.read(split, [schema.IMAGE, schema.CAPTIONS], rows)
    captions = [captions[0] for captions in table[schema.CAPTIONS].to_pylist()]
    side = min(TILE, dataset.manifest.settings.resolution)
    images = table.column(schema.IMAGE).combine_chunks().field("bytes")
    pictures = [Image.fromarray(pixels(image.as_buffer())) for image in images]
    small = [picture.resize((side, side), Image.Resampling.LANCZOS) for picture in pictures]
    title = f"{num_images} of {sizes[split]:,} pictures of {split}, {pictures[0].width} px"
    sheet = grid.contact_sheet(captions, {side: small}, title=title, blocks=BLOCKS)
    storage.write_atomically(storage.absolute(path), grid.png_bytes(sheet))


def check(dataset: PreparedDataset) -> list[str]:
    """Reads everything.

    Returns:
        A line for each thing that is not as the manifest says or as docs/dataset.md promises.
    """
    manifest = dataset.manifest
    problems = []
    if fingerprint(manifest.settings) != manifest.fingerprint:
        problems.append(f"{schema.MANIFEST}: the fingerprint is not that of the settings")
    problems += _check_null_text(dataset) + _check_names(dataset)
    for name, split in manifest.splits.items():
        examine = _Examine(dataset, name)
        files = list(_each(split.files, examine, f"checking {name}"))
        problems += [problem for file in files for problem in file.problems]
        counts = sum((file.counts for file in files), Counts())
        rejects = [file for file in _reject_files(dataset) if f"/{name}-" in file]
        num_rejects = sum(_rows(dataset, path, problems) for path in rejects)
        found = {"images": counts.images, "captions": counts.captions, "tokens": counts.tokens}
        for key, value in (found | {"rejects": num_rejects}).items():
            told = getattr(split.counts, key)
            if value != told:
                problems.append(f"{name}: {value:,} {key}, and {schema.MANIFEST} says {told:,}")
        ids = np.concatenate([file.ids for file in files] or [np.empty(0, np.int64)])
        if repeated := len(ids) - len(np.unique(ids)):
            problems.append(f"{name}: {repeated:,} rows with the image_id of another")
    return problems


def _rows(dataset: PreparedDataset, path: str, problems: list[str]) -> int:
    """Rows of a file of the dataset; none of one that cannot be read, which is a problem."""
    try:
        return int(_read(dataset, path).num_rows)
    except UserError as error:
        problems.append(str(error).partition("; --check")[0])
        return 0


def _check_null_text(dataset: PreparedDataset) -> list[str]:
    width = dataset.manifest.settings.text_width
    try:
        found = dataset.null_text
    except (OSError, ValueError, EOFError) as error:
        return [f"{schema.NULL_TEXT}: {error}"]
    if found.dtype != np.float16 or found.ndim != 2 or found.shape[1] != width:
        return [f"{schema.NULL_TEXT}: {found.dtype} {list(found.shape)}, not float16 [n, {width}]"]
    return []


def _check_names(dataset: PreparedDataset) -> list[str]:
    """Files that are not the dataset's, among those that are."""
    listed = {file.path for split in dataset.manifest.splits.values() for file in split.files}
    return [
        f"{split}/{name}: not in {schema.MANIFEST}"
        for split in schema.SPLITS
        for name in storage.list_directory(storage.join(dataset.path, split))
        if f"{split}/{name}" not in listed
    ]


@dataclass(frozen=True, slots=True)
class Examined:
    """What a check found in a file."""

    problems: list[str]
    counts: Counts
    ids: np.ndarray


class _Examine:
    """Reads all of a file."""

    def __init__(self, dataset: PreparedDataset, split: str) -> None:
        self.dataset, self.settings = dataset, dataset.manifest.settings
        self.groups: dict[str, list[RowGroup]] = {}
        for group in dataset.row_groups(split):
            self.groups.setdefault(group.path, []).append(group)

    def __call__(self, file: DataFile) -> Examined:
        path = storage.join(self.dataset.path, file.path)
        problems: list[str] = []
        counts, ids = Counts(), [np.empty(0, np.int64)]
        try:
            problems += self._check_file(path, file)
            for group in self.groups.get(path, []):
                table = read_row_group(group, schema.arrow_schema({}).names)
                problems += self._check_rows(table)
                counts += _count(table)
                ids.append(table[schema.IMAGE_ID].to_numpy())
        except (UserError, OSError, pa.ArrowException, KeyError, ValueError) as error:
            problems.append(str(error).removeprefix(f"{path}: "))
        more = len(problems) - MAX_PROBLEMS
        told = problems[:MAX_PROBLEMS] + [f"and {more} more"] * (more > 0)
        named = [f"{file.path}: {problem}" for problem in told]
        return Examined(named, counts, np.concatenate(ids))

    def _check_file(self, path: str, file: DataFile) -> Iterator[str]:
        with storage.open_input(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            found = pq.ParquetFile(stream)
            schema_found, num_rows = found.schema_arrow, found.metadata.num_rows
        if size != file.bytes:
            yield f"{size:,} bytes, and {schema.MANIFEST} says {file.bytes:,}"
        if num_rows != file.rows:
            yield f"{num_rows:,} rows, and {schema.MANIFEST} says {file.rows:,}"
        ours = schema.ours_of(schema_found)
        if not schema_found.equals(schema.arrow_schema({})):
            yield "other columns than those of the format"
        if ours.get("fingerprint") != self.dataset.manifest.fingerprint:
            yield f"fingerprint {ours.get('fingerprint')}, not the dataset's"

    def _check_rows(self, table: pa.Table) -> Iterator[str]:
        made = self.settings
        images = table[schema.IMAGE].combine_chunks().field("bytes")
        texts = {name: table[name].combine_chunks() for name in schema.TEXT_COLUMNS}
        num_captions = pc.list_value_length(table[schema.CAPTIONS]).to_pylist()
        for row, image_id in enumerate(table[schema.IMAGE_ID].to_pylist()):
            who = f"image_id {image_id}: "
            try:
                shape = pixels(images[row].as_buffer()).shape
                if shape != (made.resolution, made.resolution, 3):
                    yield f"{who}the picture has {shape[1]} x {shape[0]} pixels"
            except Exception as error:  # Pillow raises nearly everything
                yield f"{who}the picture cannot be decoded: {error}"
            text, lengths = (texts[name][row].values.to_numpy() for name in schema.TEXT_COLUMNS)
            if not num_captions[row] or len(lengths) != num_captions[row]:
                yield f"{who}{num_captions[row]} captions, and lengths of {len(lengths)}"
            if len(text) != lengths.sum() * made.text_width:
                yield f"{who}{len(text)} numbers of text for {lengths.sum()} tokens"
            if lengths.max(initial=0) > made.max_tokens:
                yield f"{who}a caption of {lengths.max()} tokens"
            if not np.isfinite(text).all():
                yield f"{who}text that is not finite"


def _count(table: pa.Table) -> Counts:
    num_captions, tokens = (
        pc.sum(column).as_py() or 0
        for column in (
            pc.list_value_length(table[schema.CAPTIONS]),
            pc.list_flatten(table[schema.TEXT_LENGTHS]),
        )
    )
    return Counts(images=table.num_rows, captions=num_captions, tokens=tokens)


def _reject_files(dataset: PreparedDataset) -> list[str]:
    """Paths inside the dataset."""
    folder = storage.join(dataset.path, schema.REJECTS_FOLDER)
    return [f"{schema.REJECTS_FOLDER}/{name}" for name in storage.list_directory(folder)]


def _read(dataset: PreparedDataset, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a file of the dataset."""
    try:
        with storage.open_input(storage.join(dataset.path, path)) as file:
            return pq.ParquetFile(file, pre_buffer=True).read(columns)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; --check looks at all files") from error


def _each(items: Sequence[Any], work: Callable[[Any], T], title: str | None = None) -> Iterator[T]:
    """Does something with each item, side by side, and gives the results in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(total=len(items), desc=title, unit="file", disable=None if title else True)
        with bar:
            for result in pool.map(work, items):
                bar.update()
                yield result


def default_sheet(dataset: str) -> str:
    """Where the contact sheet goes unless it is said."""
    return f"{Path(dataset.rstrip('/')).name}.png"
