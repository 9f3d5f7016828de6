"""Reads captions in COCO's form: which pictures there are, and what is said of each.

    {"images": [{"id": 9, "file_name": "9.jpg", ...}, ...],
     "annotations": [{"id": 3, "image_id": 9, "caption": "a red apple"}, ...]}

Every entry of ``images`` becomes one `Entry`, also where it cannot be used; so the entries are as many as the pictures of
the file. Their order is that of a hash of the id: it depends on nothing else, and neighbours have nothing in common.
Called by `prepare`.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.config import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One picture of an annotation file."""

    image_id: int
    file_name: str
    captions: tuple[str, ...] = ()
    "With single blanks between words, in the file's order, none empty."
    caption_ids: tuple[int, ...] = ()
    num_empty: int = 0
    "Captions without a word, left out."
    error: str | None = None
    "Why the picture cannot be used; None if it can."


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """The content of one annotation file."""

    entries: tuple[Entry, ...]
    "One for each picture, in shuffled order."
    num_strays: int
    "Captions of pictures that are not in the file."
    sha256: str
    "Of the file."


def read_annotations(path: str, key: str) -> Annotations:
    """Reads an annotation file.

    Args:
        path: absolute path of the file.
        key: the configuration's key that gave it, for messages.

    Raises:
        UserError: there is no such file, or it does not have COCO's form.
    """
    where = f"{key}={path!r}"
    try:
        content = storage.read_bytes(path)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from error
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: not whole JSON: {error}") from error
    images, annotations = _lists(tree, where)
    entries, num_strays = _group(images, annotations, where)
    entries.sort(key=lambda entry: hashlib.sha256(str(entry.image_id).encode()).digest())
    digest = hashlib.sha256(content).hexdigest()
    return Annotations(entries=tuple(entries), num_strays=num_strays, sha256=digest)


def _lists(tree: Any, where: str) -> tuple[list[Any], list[Any]]:
    for name in ("images", "annotations"):
        if not isinstance(tree, dict) or not isinstance(tree.get(name), list):
            raise UserError(f"{where}: must be an object with the lists images and annotations")
    return tree["images"], tree["annotations"]


def _group(images: list[Any], annotations: list[Any], where: str) -> tuple[list[Entry], int]:
    """Entries in the file's order, and the number of captions without a picture."""
    captions: dict[int, list[tuple[int, str]]] = {}
    for number, image in enumerate(images):
        here = f"{where}: images[{number}]"
        _field(image, "file_name", str, here)
        captions[_field(image, "id", int, here)] = []
    num_strays = 0
    for number, annotation in enumerate(annotations):
        here = f"{where}: annotations[{number}]"
        words = " ".join(_field(annotation, "caption", str, here).split())
        of_image = captions.get(_field(annotation, "image_id", int, here))
        if of_image is None:
            num_strays += 1
        else:
            of_image.append((_field(annotation, "id", int, here), words))
    entries, seen = [], set()
    for image in images:
        image_id, file_name = image["id"], image["file_name"]
        if image_id in seen:
            error = f"image id {image_id} appears again; the first picture with it is kept"
            entries.append(Entry(image_id=image_id, file_name=file_name, error=error))
        else:
            entries.append(_entry(image_id, file_name, captions[image_id]))
        seen.add(image_id)
    return entries, num_strays


def _entry(image_id: int, file_name: str, captions: list[tuple[int, str]]) -> Entry:
    kept = [(number, words) for number, words in captions if words]
    error = None
    if not kept:
        error = "all of its captions are empty" if captions else "it has no caption"
    return Entry(
        image_id=image_id,
        file_name=file_name,
        captions=tuple(words for _, words in kept),
        caption_ids=tuple(number for number, _ in kept),
        num_empty=len(captions) - len(kept),
        error=error,
    )


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        wanted = "an integer" if kind is int else "a text"
        raise UserError(f"{where}.{name}={value!r} must be {wanted}, as in COCO's captions files")
    return value
