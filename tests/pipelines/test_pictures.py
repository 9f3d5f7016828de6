import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines.pictures import crop_square, decode, encode, make_square

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
    with pytest.raises(ValueError, match="Premature end"):
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
    assert np.array_equal(np.asarray(crop_square(picture, 10))[5, 5], RED)
    assert np.asarray(crop_square(picture, 10)).std(axis=(0, 1)).max() == 0


def test_resizing_averages_what_is_finer_than_a_pixel():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(crop_square(Image.fromarray(stripes), 16), dtype=float)
    assert np.abs(small[:, 2:-2] - 127.5).max() < 4


def tagged(picture: Image.Image, profile: bytes, image_format: str = "PNG") -> bytes:
    return file_of(picture, image_format, icc_profile=profile)


def swapping_profile() -> bytes:
    """An ICC profile whose red is sRGB's green and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(profile[at : at + 4]): at
        for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)
    }
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    places = slice(red + 4, red + 12), slice(green + 4, green + 12)
    profile[places[0]], profile[places[1]] = profile[places[1]], profile[places[0]]
    return bytes(profile)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_colours_of_a_profile_become_srgb(image_format):
    picture = Image.new("RGB", (16, 16), (220, 40, 60))
    pixels = np.asarray(decode(tagged(picture, swapping_profile(), image_format)), dtype=float)
    assert np.abs(pixels - (40, 220, 60)).max() < 8


def test_a_profile_of_srgb_changes_nothing():
    picture = photo()
    assert np.array_equal(np.asarray(decode(tagged(picture, SRGB))), np.asarray(picture))


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200]])
def test_a_broken_profile_is_ignored(profile):
    picture = photo()
    assert np.array_equal(np.asarray(decode(tagged(picture, profile))), np.asarray(picture))


def test_grey_pictures_with_an_rgb_profile_stay_grey():
    gray = photo().convert("L")
    pixels = np.asarray(decode(tagged(gray, swapping_profile())), dtype=float)
    assert np.abs(pixels - np.asarray(gray, dtype=float)[..., None]).max() <= 1


def make(content: bytes, **changes: object):
    options = {
        "resolution": 32,
        "place": None,
        "image_format": "jpeg",
        "quality": 90,
        "max_pixels": 10**6,
    }
    return make_square(content, **options | changes)


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_a_square_of_the_right_kind_keeps_its_bytes(image_format):
    content = file_of(photo(32, 32), image_format)
    assert make(content, image_format=image_format).content is content
    assert make(content, image_format=image_format, resolution=16).content != content
    other = "png" if image_format == "jpeg" else "jpeg"
    assert make(content, image_format=other).content != content


def test_what_must_change_is_encoded_anew():
    turned = Image.Exif()
    turned[0x0112] = 3
    square = photo(32, 32)
    deep = Image.fromarray(np.zeros((32, 32), dtype=np.uint16))
    contents = {
        "turned": file_of(square, "JPEG", exif=turned),
        "other colours": tagged(square, swapping_profile(), "JPEG"),
        "grey": file_of(square.convert("L"), "JPEG"),
        "transparent": file_of(square.convert("RGBA"), "PNG"),
        "deep": file_of(deep, "PNG"),
        "animated": file_of(square, "WEBP", save_all=True, append_images=[photo(32, 32).rotate(9)]),
    }
    for name, content in contents.items():
        image_format = Image.open(io.BytesIO(content)).format.lower()
        made = make(content, image_format=image_format)
        assert made.content != content, name
        with Image.open(io.BytesIO(made.content)) as picture:
            assert (picture.mode, picture.size) == ("RGB", (32, 32)), name


@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_a_place_chooses_among_all_squares(size):
    ramp = Image.fromarray(np.arange(90, dtype=np.uint8)[None].repeat(30, axis=0))
    picture = ramp if size == (90, 30) else ramp.transpose(Image.Transpose.TRANSPOSE)
    first = [np.asarray(crop_square(picture, 30, place)).min() for place in range(61)]
    assert first == list(range(61))
    assert np.asarray(crop_square(picture, 30, 61 + 7)).min() == 7
    assert np.asarray(crop_square(picture, 30)).min() == 30


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_that_are_too_large_are_refused_before_they_are_decoded(image_format):
    content = file_of(photo(64, 32), image_format)
    assert decode(content, max_pixels=64 * 32).size == (64, 32)
    with pytest.raises(ValueError, match="64 x 32 pixels are more than 2047"):
        decode(content, max_pixels=2047)


def test_flipped_bits_are_seen_where_the_format_lets_them_be_seen():
    """PNG's checksums see each; of a JPEG's single bits most change a few pixels and nothing else, but not of many."""
    rng = np.random.default_rng(0)
    png, jpeg = file_of(photo(), "PNG"), file_of(photo(256, 256), "JPEG", quality=95)

    def damaged(content: bytes, start: int, flips: int) -> bytes:
        changed = bytearray(content)
        for at in rng.integers(start, len(content) - 2, flips):
            changed[at] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    for _ in range(50):
        for content in (damaged(png, 0, 1), damaged(jpeg, 700, 100)):
            with pytest.raises((ValueError, OSError, SyntaxError)):
                decode(content)


def test_much_larger_pictures_are_still_resized_by_the_filter():
    big = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    ).resize((1800, 1800), Image.Resampling.BICUBIC)
    exact = np.asarray(big.resize((60, 60), Image.Resampling.LANCZOS), dtype=float)
    error = np.asarray(crop_square(big, 60), dtype=float) - exact
    assert 10 * np.log10(255**2 / (error**2).mean()) > 45
