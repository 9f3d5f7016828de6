"""Picture files of any kind to small encoded squares.

A picture becomes upright sRGB of 8 bits a channel: EXIF's rotation is applied, a colour profile is converted from, transparency
shows white, grey and CMYK become RGB, 16 bits are scaled. A damaged picture is an error as far as its format lets damage be
seen, never half a picture: PNG has checksums, and a JPEG's decoder must have nothing to complain of. A square of it is resized
with an antialiased Lanczos filter (Duchon 1979, support 3).

`prepare` runs this in Ray's tasks; it imports neither torch nor Ray, so that they start fast.
"""

import functools
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageOps

Format = Literal["png", "webp", "jpeg"]

SAVE_OPTIONS: dict[Format, dict[str, object]] = {
    "png": {"compress_level": 6},
    "webp": {"lossless": True, "method": 4},
    "jpeg": {"subsampling": 0},  # full colour resolution: small pictures show the loss
}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is read; not all that Pillow can, for it would start other programs for some."""

REDUCING_GAP = 4.0
"""Much larger pictures are first averaged over whole pixels, down to four times the size: 50 dB from Lanczos alone, several
times faster. JPEG's own scaled decoding would be faster still, but is 20 dB worse, because it does not filter."""

_ORIENTATION = 0x0112
"""EXIF's tag; 2 to 8 mean turned or mirrored."""

_PNG_BIT_DEPTH = 24
"""Place of a byte in a PNG file."""

_MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


@dataclass(frozen=True, slots=True)
class Square:
    """A prepared picture."""

    width: int
    "Of the original, upright."
    height: int
    content: bytes
    "The square, encoded."


@dataclass(frozen=True, slots=True)
class _Decoded:
    picture: Image.Image
    "Upright, opaque, 8 bits: RGB, L or CMYK."
    profile: bytes | None
    "ICC profile of its colours where they are not sRGB."
    kept_as: str | None
    "Name of the format where its file holds exactly these pixels, in a plain form."


def make_square(
    content: bytes,
    *,
    resolution: int,
    place: int | None,
    image_format: Format,
    quality: int | None,
    max_pixels: int,
) -> Square:
    """Decodes a picture file, crops it to a square, resizes and encodes it.

    A file that is such a square already is kept as it is, byte for byte.

    Args:
        content: of the file.
        resolution: pixels of the square's side.
        place: where the square lies along the longer side, any number, modulo the places there are; None for the middle.
        image_format: as `encode`.
        quality: as `encode`.
        max_pixels: a larger picture is an error, before memory is taken for its pixels.

    Raises:
        Exception: of many kinds, whatever Pillow raises for what is not a whole picture.
    """
    decoded = _decode(content, max_pixels)
    width, height = decoded.picture.size
    if decoded.kept_as == image_format and (width, height) == (resolution, resolution):
        return Square(width, height, content)
    square = crop_square(decoded.picture, resolution, place)
    # After resizing there are fewer pixels to convert.
    square = _to_srgb(square, decoded.profile)
    return Square(width, height, encode(square, image_format, quality))


def decode(content: bytes, max_pixels: int = 2**27) -> Image.Image:
    """Decodes a picture file to an upright sRGB picture; for the arguments see `make_square`."""
    decoded = _decode(content, max_pixels)
    return _to_srgb(decoded.picture, decoded.profile)


def crop_square(picture: Image.Image, resolution: int, place: int | None = None) -> Image.Image:
    """Returns a square as large as fits, at ``resolution`` x ``resolution`` pixels.

    Args:
        picture: to cut from.
        resolution: pixels of the square's side.
        place: as in `make_square`.
    """
    width, height = picture.size
    side = min(width, height)
    room = max(width, height) - side
    offset = room // 2 if place is None else place % (room + 1)
    left, top = (offset, 0) if width > height else (0, offset)
    # Not resize(box=...): its filter reaches over the edge of the box.
    square = picture.crop((left, top, left + side, top + side))
    return square.resize(
        (resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP
    )


def encode(picture: Image.Image, image_format: Format, quality: int | None) -> bytes:
    """Encodes a picture: png and webp without loss, jpeg with ``quality`` from 1 to 100."""
    options = dict(SAVE_OPTIONS[image_format])
    if image_format == "jpeg":
        options["quality"] = quality
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _decode(content: bytes, max_pixels: int) -> _Decoded:
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        if opened.width * opened.height > max_pixels:
            raise ValueError(f"{opened.width} x {opened.height} pixels are more than {max_pixels}")
        if opened.format == "PNG":
            with Image.open(io.BytesIO(content), formats=["PNG"]) as again:
                again.verify()
        picture = _load(opened, content)
        turned = picture.getexif().get(_ORIENTATION, 1) in range(2, 9)
        ImageOps.exif_transpose(picture, in_place=True)
        profile = opened.info.get("icc_profile")
        plain = (
            picture.mode == "RGB"
            and not picture.has_transparency_data
            and not turned
            and _transform(profile) is None
            and getattr(opened, "n_frames", 1) == 1
            and not (opened.format == "PNG" and content[_PNG_BIT_DEPTH] != 8)
        )
        name = opened.format.lower() if plain and opened.format else None
        return _Decoded(_opaque(picture), profile, name)


def _load(opened: Any, content: bytes) -> Image.Image:
    """All pixels of a picture, as they are stored."""
    if opened.format not in ("JPEG", "MPO") or opened.mode not in ("RGB", "L"):
        opened.load()
        return opened  # type: ignore[no-any-return]
    # The same decoder as Pillow's, but it tells what it finds wrong with the data; Pillow shows what it can of them.
    raw = "RGBX" if opened.mode == "RGB" else "L"
    pixels = simplejpeg.decode_jpeg(content, "GRAY" if raw == "L" else raw, strict=True)
    picture = Image.frombytes(opened.mode, opened.size, pixels, "raw", raw)
    picture.info = opened.info
    return picture


def _opaque(picture: Image.Image) -> Image.Image:
    """The picture on white, with 8 bits a channel: RGB, L or CMYK."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(picture)))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode} have no defined white")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode in ("RGB", "L", "CMYK") else picture.convert("RGB")


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts from the colours of an ICC profile; one that does not fit the picture is ignored, as browsers do."""
    found = _transform(profile)
    if found is not None:
        mode, transform = found
        if picture.mode == mode or (picture.mode, mode) == ("L", "RGB"):
            return ImageCms.applyTransform(picture.convert(mode), transform)  # type: ignore[return-value]
    return picture.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None) -> tuple[str, Any] | None:
    """Mode of pictures with this ICC profile and what converts them to sRGB; None if nothing can or need be done."""
    if profile is None:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODE_OF_SPACE.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None
    if mode == "RGB" and _is_identity(transform):
        return None
    return mode, transform


def _is_identity(transform: Any) -> bool:
    """Whether no colour changes by more than a level: a profile of sRGB itself, of which there are many."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(9, 81, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(grid), transform))
    return int(np.abs(after.astype(np.int16) - grid).max()) <= 1


def _to_8_bits(gray: np.ndarray) -> np.ndarray:
    """65535 -> 255, rounded; also for big-endian pixels."""
    return ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
