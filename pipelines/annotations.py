"""What is said of each picture: the entries that a source lists, and captions in COCO's form as one way to get them.

    {"images": [{"id": 9, "file_name": "9.jpg", ...}, ...],
     "annotations": [{"id": 3, "image_id": 9, "caption": "a red apple"}, ...]}

Every picture becomes one `Entry`, also where it cannot be used; so the entries are as many as the pictures. They are kept as an
Arrow table, a tenth of what Python's objects would take. Called by `sources`.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.errors import UserError

ENTRIES = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("caption_ids", pa.list_(pa.int64())),
        ("num_empty", pa.int32()),
        ("error", pa.string()),
        ("place", pa.list_(pa.int32())),
    ]
)
"""Columns of `Listing.entries`: the fields of `Entry`."""

ENTRIES_AT_ONCE = 8192
"""How many become Arrow's together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One picture."""

    image_id: int
    file_name: str
    "As the source has it; inside the folder of pictures where there is one."
    captions: tuple[str, ...] = ()
    "With single blanks between words, in the source's order, none empty."
    caption_ids: tuple[int, ...] = ()
    num_empty: int = 0
    "Captions without a word, left out."
    error: str | None = None
    "Why the picture cannot be used; None if it can."
    place: tuple[int, ...] = ()
    "Where the source finds it again, if not by name."


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a source holds."""

    entries: pa.Table
    "`ENTRIES`, one for each picture."
    sha256: str | None
    "Of everything that decides the entries; None where there is no source."
    num_strays: int = 0
    "Captions of pictures that are not in the list."

    @property
    def num_images(self) -> int:
        """Pictures, with those that cannot be used."""
        return int(self.entries.num_rows)


def to_table(entries: Iterable[Entry]) -> pa.Table:
    """Entries as Arrow, with the columns `ENTRIES`."""
    parts = [ENTRIES.empty_table()]
    remaining = iter(entries)
    while some := list(itertools.islice(remaining, ENTRIES_AT_ONCE)):
        # Not asdict, which copies deeply.
        columns = {
            field.name: [getattr(entry, field.name) for entry in some]
            for field in dataclasses.fields(Entry)
        }
        parts.append(pa.table(columns, schema=ENTRIES))
    return pa.concat_tables(parts)


def shuffle_key(image_id: int) -> bytes:
    """Sorts pictures in an order that depends on their ids alone, in which neighbours have nothing in common."""
    return hashlib.sha256(str(image_id).encode()).digest()


def make_entry(
    image_id: int, file_name: str, captions: Sequence[tuple[int, str]], place: tuple[int, ...] = ()
) -> Entry:
    """The entry of a picture with these captions, each with its id."""
    cleaned = [(number, " ".join(words.split())) for number, words in captions]
    kept = [(number, words) for number, words in cleaned if words]
    error = None
    if not kept:
        error = "all of its captions are empty" if captions else "it has no caption"
    return Entry(
        image_id=image_id,
        file_name=file_name,
        captions=tuple(words for _, words in kept),
        caption_ids=tuple(number for number, _ in kept),
        num_empty=len(cleaned) - len(kept),
        error=error,
        place=place,
    )


def once_each(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries in which a picture whose id came before has become an error."""
    seen: set[int] = set()
    for entry in entries:
        if entry.image_id in seen:
            error = f"image id {entry.image_id} appears again; the first picture with it is kept"
            yield Entry(
                image_id=entry.image_id, file_name=entry.file_name, error=error, place=entry.place
            )
        else:
            yield entry
        seen.add(entry.image_id)


def parse_coco(content: bytes, where: str) -> tuple[list[Entry], int]:
    """Reads captions in COCO's form.

    Args:
        content: of the file.
        where: key and path, for messages.

    Returns:
        Entries in the file's order, and the number of captions of pictures that are not in it.

    Raises:
        UserError: it does not have COCO's form.
    """
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: not whole JSON: {error}") from error
    for name in ("images", "annotations"):
        if not isinstance(tree, dict) or not isinstance(tree.get(name), list):
            raise UserError(f"{where}: must be an object with the lists images and annotations")
    return _group(tree["images"], tree["annotations"], where)


def _group(images: list[Any], annotations: list[Any], where: str) -> tuple[list[Entry], int]:
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, image in enumerate(images):
        here = f"{where}: images[{number}]"
        _field(image, "file_name", str, here)
        captions[_field(image, "id", int, here)] = []
    num_strays = 0
    for number, annotation in enumerate(annotations):
        here = f"{where}: annotations[{number}]"
        words = _field(annotation, "caption", str, here)
        of_image = captions.get(_field(annotation, "image_id", int, here))
        if of_image is None:
            num_strays += 1
        else:
            of_image.append((_field(annotation, "id", int, here), words))
    entries = (
        make_entry(image["id"], image["file_name"], captions[image["id"]]) for image in images
    )
    return list(once_each(entries)), num_strays


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        wanted = "an integer" if kind is int else "a text"
        raise UserError(f"{where}.{name}={value!r} must be {wanted}, as in COCO's captions files")
    return value
