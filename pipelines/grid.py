"""Contact sheets: captions beside their pictures at every resolution, and pictures beside those nearest to them.

A sheet has one row a caption: the wrapped caption on the left, then one tile a resolution, low to high. Tiles are enlarged
to one common side by whole multiples without smoothing, so that a pixel of the model is a square on the sheet. Many
captions are laid out in several blocks side by side.

Called by `train` (samples on the way), `evaluate` (grid.png, nearest.png), `sample` and `ablation`.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from PIL.PngImagePlugin import PngInfo

Picture = Image.Image | np.ndarray
"A PIL image, or uint8 [resolution, resolution, 3]."
Neighbour = tuple[Picture, str, float]
"A training picture, its caption, and how far it is from another picture."

_TILE = 128  # least side of a tile on the sheet, in pixels
_CAPTION = 176  # width of the captions
_GAP = 8  # between tiles
_MARGIN = 24  # around the sheet and between blocks
_FONT = 16
_LINE = 20  # height of a line of text
_LINES_BELOW = 3  # of a caption below its picture
_LINES_ABOVE = 6  # of a column's heading
_SMALL_TILE = 96  # least side of a tile where there are many columns
_INK, _FAINT, _FRAME, _PAPER = "#1c1c22", "#76767f", "#dcdce2", "#ffffff"


def contact_sheet(
    captions: Sequence[str],
    images: Mapping[int, Sequence[Picture]],
    *,
    title: str = "",
    blocks: int = 1,
) -> Image.Image:
    """Draw captions and their pictures on one RGB image.

    Args:
        captions: one a row.
        images: resolution in pixels to its pictures, as many as there are captions; the highest resolution must be a
            multiple of the others.
        title: a line above everything.
        blocks: groups of rows side by side; rows fill the first block first.

    Raises:
        ValueError: there is nothing to draw, or not one picture a caption.
    """
    resolutions = sorted(images)
    wrong = [r for r in resolutions if len(images[r]) != len(captions)]
    if not captions or not resolutions or wrong:
        counts = {r: len(images[r]) for r in resolutions}
        raise ValueError(f"a sheet of {len(captions)} captions got these pictures: {counts}")
    tile = resolutions[-1] * -(-_TILE // resolutions[-1])
    blocks = min(blocks, len(captions))
    rows = -(-len(captions) // blocks)
    width = _CAPTION + len(resolutions) * (tile + _GAP)
    top = _MARGIN + (_LINE + _GAP if title else 0)
    size = (
        _MARGIN + blocks * (width + _MARGIN),
        top + _LINE + _GAP + rows * (tile + _GAP) + _MARGIN - _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font()
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=font)
    for i, caption in enumerate(captions):
        block, row = divmod(i, rows)
        left = _MARGIN + block * (width + _MARGIN)
        y = top + _LINE + _GAP + row * (tile + _GAP)
        lines = wrap(caption, _CAPTION - 2 * _GAP, max_lines=tile // _LINE)
        draw.text((left, y + tile // 2), "\n".join(lines), fill=_INK, font=font, anchor="lm")
        for column, resolution in enumerate(resolutions):
            x = left + _CAPTION + column * (tile + _GAP)
            if row == 0:
                heading = (x + tile // 2, top + _LINE // 2)
                draw.text(heading, f"{resolution} px", fill=_FAINT, font=font, anchor="mm")
            _paste(sheet, draw, images[resolution][i], (x, y), tile)
    return sheet


def side_by_side(captions: Sequence[str], columns: Mapping[str, Sequence[Picture]]) -> Image.Image:
    """Draw captions, and in each column what another hand drew for them.

    Args:
        captions: one a row.
        columns: heading to its pictures, as many as there are captions, all of one size.

    Raises:
        ValueError: there is nothing to draw, or not one picture a caption.
    """
    counts = {name: len(pictures) for name, pictures in columns.items()}
    if not captions or not columns or set(counts.values()) != {len(captions)}:
        raise ValueError(f"a sheet of {len(captions)} captions got these pictures: {counts}")
    side = _picture(next(iter(columns.values()))[0]).width
    tile = side * -(-_SMALL_TILE // side)
    headings = {name: wrap(name, tile, max_lines=_LINES_ABOVE) for name in columns}
    top = _MARGIN + max(map(len, headings.values())) * _LINE + _GAP
    size = (
        _MARGIN + _CAPTION + len(columns) * (tile + _GAP) - _GAP + _MARGIN,
        top + len(captions) * (tile + _GAP) - _GAP + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font()
    for row, caption in enumerate(captions):
        y = top + row * (tile + _GAP)
        lines = wrap(caption, _CAPTION - 2 * _GAP, max_lines=tile // _LINE)
        draw.text((_MARGIN, y + tile // 2), "\n".join(lines), fill=_INK, font=font, anchor="lm")
    for column, (name, pictures) in enumerate(columns.items()):
        x = _MARGIN + _CAPTION + column * (tile + _GAP)
        draw.text(
            (x + tile // 2, top - _GAP),
            "\n".join(headings[name]),
            fill=_FAINT,
            font=font,
            anchor="md",
            align="center",
        )
        for row, picture in enumerate(pictures):
            _paste(sheet, draw, picture, (x, top + row * (tile + _GAP)), tile)
    return sheet


def nearest_sheet(rows: Sequence[tuple[Picture, str, Sequence[Neighbour]]]) -> Image.Image:
    """Draw pictures, each beside the pictures nearest to it with their distances and captions.

    Args:
        rows: pictures that were drawn, their captions, and of each the nearest training pictures, nearest first.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not rows:
        raise ValueError("a sheet of nearest pictures got no pictures")
    side = max(_picture(picture).width for picture, _, _ in rows)
    tile = side * -(-_TILE // side)
    columns = max(len(neighbours) for _, _, neighbours in rows)
    right = _MARGIN + tile + _MARGIN
    top, height = _MARGIN + _LINE + _GAP, tile + (2 + _LINES_BELOW) * _LINE
    size = (right + max(columns, 2) * (tile + _GAP) - _GAP + _MARGIN, top + len(rows) * height)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _font()
    draw.text((_MARGIN, _MARGIN), "drawn", fill=_FAINT, font=font)
    draw.text((right, _MARGIN), "nearest training pictures", fill=_FAINT, font=font)
    for number, (picture, caption, neighbours) in enumerate(rows):
        y = top + number * height
        tiles = [(_MARGIN, picture, caption, "")]
        tiles += [
            (right + column * (tile + _GAP), near, told, f"{distance:.4g}")
            for column, (near, told, distance) in enumerate(neighbours)
        ]
        for x, shown, told, distance in tiles:
            _paste(sheet, draw, shown, (x, y), tile)
            draw.text((x, y + tile + 4), distance, fill=_FAINT, font=font)
            below = y + tile + 4 + (_LINE if distance else 0)
            lines = wrap(told, tile, max_lines=_LINES_BELOW)
            draw.text((x, below), "\n".join(lines), fill=_INK, font=font)
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Picture, at: tuple[int, int], tile: int
) -> None:
    """A picture in a frame, enlarged to a tile."""
    x, y = at
    enlarged = _picture(picture).resize((tile, tile), Image.Resampling.NEAREST)
    sheet.paste(enlarged, at)
    draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=_FRAME)


def png_bytes(picture: Image.Image, facts: Mapping[str, str] | None = None) -> bytes:
    """A picture as a PNG file, with text chunks of these names and values."""
    info = PngInfo()
    for key, value in (facts or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Break text into lines of at most `width` pixels; what does not fit in `max_lines` becomes an ellipsis."""
    font, lines, words = _font(), [""], text.split()
    while words:
        word = words.pop(0)
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == max_lines:
            return [*lines[:-1], _cut(lines[-1] or word, width)]
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:  # one word wider than the line
            fits = 1
            while font.getlength(word[: fits + 1]) <= width:
                fits += 1
            fits = word.rfind("-", 0, fits) + 1 or fits
            lines[-1:] = [word[:fits], ""]
            words.insert(0, word[fits:])
    return lines


def _cut(line: str, width: int) -> str:
    """The line's beginning with an ellipsis that still fits."""
    font, line = _font(), line[:width]
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _picture(picture: Picture) -> Image.Image:
    return Image.fromarray(np.asarray(picture)) if not isinstance(picture, Image.Image) else picture


def _font() -> FreeTypeFont:
    font = ImageFont.load_default(_FONT)
    assert isinstance(font, FreeTypeFont)  # Pillow's wheels come with FreeType
    return font
