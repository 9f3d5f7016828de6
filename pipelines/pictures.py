"""Picture files of any kind to small encoded squares.

Whatever Pillow reads becomes an upright sRGB picture of 8 bits a channel: EXIF's rotation is applied, transparency shows
white, grey and CMYK become RGB, 16 bits are scaled. A picture that ends before its last row is an error, never half a
picture. The largest centred square is resized with an antialiased Lanczos filter (Duchon 1979, support 3).

`prepare` runs this in Ray's tasks; it imports neither torch nor Ray, so that they start fast.
"""

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

SAVE_OPTIONS: dict[str, dict[str, object]] = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "method": 4},
    "jpeg": {"subsampling": 0},  # full colour resolution: small pictures show the loss
}


def decode(content: bytes) -> Image.Image:
    """Decodes a picture file to an upright RGB picture.

    Raises:
        Exception: of many kinds, whatever Pillow raises for what is not a whole picture.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
        if picture.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {picture.mode} have no defined white")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")


def center_square(picture: Image.Image, resolution: int) -> Image.Image:
    """Returns the largest centred square of a picture at ``resolution`` x ``resolution`` pixels."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Not resize(box=...): its filter reaches over the edge of the box.
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def encode(
    picture: Image.Image, image_format: Literal["png", "webp", "jpeg"], quality: int | None
) -> bytes:
    """Encodes a picture: png and webp without loss, jpeg with ``quality`` from 1 to 100."""
    options = dict(SAVE_OPTIONS[image_format])
    if image_format == "jpeg":
        options["quality"] = quality
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _to_8_bits(gray: np.ndarray) -> np.ndarray:
    """65535 -> 255, rounded; also for big-endian pixels."""
    return ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
