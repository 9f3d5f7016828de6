"""Pictures inside a page: chosen, shrunk, and as data: URIs.

Called by those who make pages.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from pipelines.markup import Element, element

MAX_BYTES = 150_000
"""Of a PNG that is embedded as it is."""
_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture as text."""

    uri: str
    width: int
    height: int


def embed(content: bytes, width: int) -> Embedded | None:
    """A picture for a page: as it is if it is small, else as WebP of at most so many pixels across.

    Args:
        content: of a PNG file.
        width: in pixels.

    Returns:
        The picture; None where the file cannot be read as one.
    """
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            opened.load()
            picture = opened.convert("RGB")
    except Exception:  # Pillow raises nearly everything
        return None
    if picture.width <= width and len(content) <= MAX_BYTES:
        return Embedded(_uri("png", content), *picture.size)
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=_QUALITY)
    return Embedded(_uri("webp", buffer.getvalue()), *picture.size)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(content: bytes | OSError, told: str, alt: str, width: int) -> Element:
    """A picture with a caption; a sentence in its place where it cannot be read.

    Args:
        content: of a PNG file, or why there is none.
        told: the caption.
        alt: what it shows, for those who do not see it.
        width: in pixels, at most.
    """
    found = None if isinstance(content, OSError) else embed(content, width)
    caption = element("figcaption", told)
    if found is None:
        return element("figure", caption, element("p", "cannot be read as a picture", class_="bad"))
    picture = element("img", src=found.uri, alt=alt, width=found.width, height=found.height)
    return element("figure", caption, picture)


def evenly(items: Sequence[str], limit: int) -> list[str]:
    """At most so many, at least 2, evenly from the first to the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(number * (len(items) - 1) / (limit - 1))] for number in range(limit)]
