"""What a contact sheet shows, read back from its pixels."""

import numpy as np
import pytest
from PIL import Image

from pipelines.grid import _font, contact_sheet, nearest_sheet, wrap


def _flat(resolution: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((resolution, resolution, 3), colour, dtype=np.uint8)


def _area(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


@pytest.mark.parametrize("blocks", [1, 2, 9])
def test_every_picture_fills_a_tile_of_the_common_size(blocks: int) -> None:
    colours = [(250, 10 * i, 0) for i in range(5)]
    images = {16: [_flat(16, c) for c in colours], 64: [_flat(64, c) for c in colours]}
    sheet = contact_sheet(["a"] * 5, images, blocks=blocks)
    for colour in colours:
        assert _area(sheet, colour) == 2 * 128 * 128


def test_pixels_are_enlarged_to_squares_and_large_pictures_kept_as_they_are() -> None:
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (r, r, 3), dtype=np.uint8) for r in (64, 256))
    sheet = np.asarray(contact_sheet(["noise"], {64: [small], 256: [Image.fromarray(large)]}))
    right = sheet.shape[1] - 24 - 8
    top = sheet.shape[0] - 24 - 256
    np.testing.assert_array_equal(sheet[top : top + 256, right - 256 : right], large)
    left = right - 2 * 256 - 8
    enlarged = small.repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(sheet[top : top + 256, left : left + 256], enlarged)


@pytest.mark.parametrize(
    "text", ["", "a red apple", "word " * 500, "x" * 5000, "日本語 emoji 🍎 " * 40]
)
def test_wrapped_captions_stay_inside_their_column(text: str) -> None:
    lines = wrap(text, 160, max_lines=6)
    assert 1 <= len(lines) <= 6
    assert all(_font().getlength(line) <= 160 for line in lines)
    kept = "".join(lines).replace(" ", "")
    whole = text.replace(" ", "")
    assert kept == whole or (kept.endswith("...") and whole.startswith(kept[:-3]))


def test_a_word_that_is_too_wide_breaks_at_its_hyphen() -> None:
    assert wrap("at equal multiply-adds", 90, max_lines=4) == ["at equal", "multiply-", "adds"]


def test_a_sheet_needs_one_picture_a_caption() -> None:
    with pytest.raises(ValueError, match=r"a sheet of 2 captions got these pictures: \{16: 1\}"):
        contact_sheet(["a", "b"], {16: [_flat(16, (0, 0, 0))]})


def test_nearest_pictures_stand_beside_the_one_they_are_near_to() -> None:
    drawn = [_flat(32, (250, 0, i)) for i in range(3)]
    near = [
        [(_flat(32, (0, 10 * i, 10 * k + 1)), "x" * 500, 0.1 * k) for k in range(i)]
        for i in range(3)
    ]
    captions = ["a", "", "日本語 " * 50]
    sheet = np.asarray(nearest_sheet(list(zip(drawn, captions, near, strict=True))))
    for i in range(3):
        rows, columns = np.nonzero((sheet == (250, 0, i)).all(-1))
        assert len(rows) == 128 * 128
        for picture, _, _ in near[i]:
            beside, right = np.nonzero((sheet == picture[0, 0]).all(-1))
            assert len(beside) == 128 * 128
            assert set(beside) == set(rows)
            assert right.min() > columns.max()
            columns = right


def test_a_sheet_of_nearest_pictures_needs_one() -> None:
    with pytest.raises(ValueError, match="got no pictures"):
        nearest_sheet([])
