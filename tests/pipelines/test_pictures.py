import io

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures import center_square, decode, encode

RED = (200, 30, 40)


def file_of(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """Smooth colours with noise, so that a JPEG of it has many bytes."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, 1 - x * y], axis=-1) * 200
    noise = np.random.default_rng(0).uniform(0, 50, pixels.shape)
    return Image.fromarray((pixels + noise).astype(np.uint8))


def test_lossless_formats_give_back_the_pixels():
    picture = photo()
    for image_format in ("png", "webp"):
        again = decode(encode(picture, image_format, None))
        assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_better_jpegs_are_larger_and_closer():
    picture = photo()
    files = [encode(picture, "jpeg", quality) for quality in (30, 70, 95)]
    errors = [
        np.abs(np.asarray(decode(content), dtype=float) - np.asarray(picture)).mean()
        for content in files
    ]
    assert [len(content) for content in files] == sorted(len(content) for content in files)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 6


def test_grayscale_has_three_equal_channels():
    gray = photo().convert("L")
    pixels = np.asarray(decode(file_of(gray, "PNG")))
    assert all(np.array_equal(pixels[..., k], np.asarray(gray)) for k in range(3))


def test_cmyk_jpeg_keeps_its_colours():
    picture = Image.new("RGB", (32, 32), RED)
    pixels = np.asarray(decode(file_of(picture.convert("CMYK"), "JPEG", quality=95)), dtype=float)
    assert np.abs(pixels - RED).max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_shows_white(mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image_format = "TIFF" if mode == "PA" else "PNG"
    content = file_of(picture if mode == "PA" else picture.convert(mode), image_format)
    pixels = np.asarray(decode(content))
    assert pixels[:, :4].max() == 0
    assert pixels[:, 4:].min() == 255


def test_half_transparent_is_half_way_to_white():
    picture = Image.new("RGBA", (4, 4), (*RED, 128))
    pixels = np.asarray(decode(file_of(picture, "PNG")), dtype=float)
    half = np.array(RED) * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels - half).max() <= 1


def test_transparent_palette_shows_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    pixels = np.asarray(decode(file_of(picture, "PNG", transparency=1)))
    assert pixels.min() == 255


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(4, axis=0)
    pixels = np.asarray(decode(file_of(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(pixels[0, :, 0], np.arange(256))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste(RED, (0, 0, 20, 10))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> PIL's inverse transposition
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(
        np.asarray(decode(file_of(stored, "PNG", exif=exif))), np.asarray(upright)
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_half_a_jpeg_is_an_error(options):
    content = file_of(photo(), "JPEG", **options)
    with pytest.raises(OSError, match="truncated"):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"this is no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_an_error(content):
    with pytest.raises(OSError, match="cannot identify"):
        decode(content)


def test_floating_point_pixels_are_an_error():
    picture = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="mode F"):
        decode(file_of(picture, "TIFF"))


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (31, 30), (30, 30)])
def test_the_centre_is_kept(size):
    width, height = size
    picture = Image.new("RGB", size, "black")
    left, top = (width - 30) // 2, (height - 30) // 2
    picture.paste(RED, (left, top, left + 30, top + 30))
    assert np.array_equal(np.asarray(center_square(picture, 10))[5, 5], RED)
    assert np.asarray(center_square(picture, 10)).std(axis=(0, 1)).max() == 0


def test_resizing_averages_what_is_finer_than_a_pixel():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(center_square(Image.fromarray(stripes), 16), dtype=float)
    assert np.abs(small[:, 2:-2] - 127.5).max() < 4
