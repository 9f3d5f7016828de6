"""Draws the demo's pictures: named Noto emoji on plain coloured backgrounds, in the exact layout of COCO captions.

`objects.txt` names about 300 emoji as a person would. Each is drawn on a few of the eight `BACKGROUNDS` on which its
outline stands out; one of these pictures goes to `val`, the others to `train`. So every validation picture pairs an
object with a background it was never seen on in training, while both words were. The choice is greedy and balanced, and
depends neither on the resolution nor on chance. `captions_*_small.json` list every fifth object's pictures only, for
training that has minutes.

    npm pack @iconify-json/noto@1.2.9 && tar xzf iconify-json-noto-1.2.9.tgz
    python -m pipelines.emoji.render --source package --out pipelines/emoji

needs `pip install resvg-py` and gives the committed files; `--resolution 512 --out elsewhere` gives larger ones.
"""

import argparse
import collections
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

OBJECTS = Path(__file__).with_name("objects.txt")
FILL = 0.8  # longer side of the drawing / side of the picture
PROBE_RESOLUTION = 64
CLASH_DISTANCE = 90.0  # two colours closer than this, in 8-bit RGB, hardly stand apart
CLASH_SHARE = 0.25  # of an outline may clash with a background
SMALL_STEP = 5  # every fifth object is in the small annotation files


@dataclasses.dataclass(frozen=True)
class Background:
    """A plain background: its name with the article, and its sRGB colour."""

    name: str
    rgb: tuple[int, int, int]


BACKGROUNDS = (
    Background("a white", (255, 255, 255)),
    Background("a yellow", (255, 226, 64)),
    Background("an orange", (255, 145, 40)),
    Background("a pink", (255, 182, 205)),
    Background("a purple", (150, 105, 210)),
    Background("a blue", (110, 190, 250)),
    Background("a green", (125, 210, 110)),
    Background("a gray", (150, 150, 155)),
)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One emoji: its names ("a red apple"), its SVG body, and the square view box (x, y, side) that centres it."""

    names: tuple[str, ...]
    body: str
    view: tuple[float, float, float]


def read_objects() -> dict[str, tuple[str, ...]]:
    """Returns icon name -> what a person calls it, from `objects.txt`, in its order."""
    lines = OBJECTS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return {icon: tuple(names.split(" | ")) for icon, names in pairs}


def rasterize(
    body: str, view: tuple[float, float, float], resolution: int, background: str | None = None
) -> Image.Image:
    """Draws an SVG body with the square view box `view` at `resolution` x `resolution` pixels, RGBA."""
    import resvg_py

    x, y, side = view
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x} {y} {side} {side}">{body}</svg>'
    )
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=resolution,
        height=resolution,
        background=background,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def load_drawings(source: Path) -> list[Drawing]:
    """Reads the named emoji from an unpacked `@iconify-json/noto` and frames each so that it fills `FILL` of a side."""
    icons = json.loads((source / "icons.json").read_text(encoding="utf-8"))
    side = float(icons["width"])
    probe = 256
    drawings = []
    for icon, names in read_objects().items():
        body = icons["icons"][icon]["body"]
        box = rasterize(body, (0.0, 0.0, side), probe).getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"{icon}: an empty drawing")
        left, top, right, bottom = (edge * side / probe for edge in box)
        extent = max(right - left, bottom - top) / FILL
        view = ((left + right - extent) / 2, (top + bottom - extent) / 2, extent)
        drawings.append(Drawing(names, body, view))
    return drawings


def clash(drawing: Drawing) -> list[float]:
    """Returns for each background the share of the drawing's outline that hardly stands apart from it."""
    rgba = np.asarray(rasterize(drawing.body, drawing.view, PROBE_RESOLUTION), dtype=np.float64)
    solid = rgba[..., 3] > 200
    inside = solid.copy()
    for axis in (0, 1):
        for shift in (-2, 2):
            inside &= np.roll(solid, shift, axis)
    outline = rgba[..., :3][solid & ~inside]
    return [
        float(np.mean(np.linalg.norm(outline - np.array(background.rgb), axis=1) < CLASH_DISTANCE))
        for background in BACKGROUNDS
    ]


def choose_backgrounds(
    clashes: list[list[float]], num_backgrounds: int
) -> list[tuple[int, list[int]]]:
    """Chooses for each object one background for `val` and `num_backgrounds - 1` others for `train`.

    Each object takes, of those it stands out on, the backgrounds used least so far.
    """
    used: dict[str, collections.Counter[int]] = {
        "train": collections.Counter(),
        "val": collections.Counter(),
    }
    chosen = []
    for index, shares in enumerate(clashes):
        ranked = sorted(range(len(BACKGROUNDS)), key=lambda k: shares[k])
        num_clear = sum(share <= CLASH_SHARE for share in shares)
        clear = ranked[: max(num_clear, num_backgrounds)]

        def least_used(split: str, k: int, turn: int = index) -> tuple[int, int]:
            return used[split][k], (k + 3 * turn) % len(BACKGROUNDS)

        val = min(clear, key=lambda k: least_used("val", k))
        others = sorted((k for k in clear if k != val), key=lambda k: least_used("train", k))
        train = sorted(others[: num_backgrounds - 1])
        used["val"][val] += 1
        used["train"].update(train)
        chosen.append((val, train))
    return chosen


def captions_of(names: tuple[str, ...], background: Background) -> list[str]:
    """Returns three captions of one picture: each name on its background, and the first name in other words."""
    first = names[0]
    bare = first.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    colour = background.name.split(" ", 1)[1]
    captions = [f"{name} on {background.name} background" for name in names]
    captions.append(f"{bare}, {colour} background")
    captions.append(f"{first} in front of {background.name} background")
    return captions[:3]


def annotation_file(
    images: list[dict[str, Any]], annotations: list[dict[str, Any]], version: str
) -> dict[str, Any]:
    """Returns the content of one `captions_*.json`, with every field COCO's own files have."""
    return {
        "info": {
            "description": "Noto emoji on plain backgrounds, with captions",
            "url": "https://github.com/googlefonts/noto-emoji",
            "version": version,
            "year": 2026,
            "contributor": "Google Inc. (emoji), @iconify-json/noto (package)",
            "date_created": "2026-11-23",
        },
        "images": images,
        "licenses": [
            {
                "id": 1,
                "name": "Apache License 2.0",
                "url": "https://www.apache.org/licenses/LICENSE-2.0",
            }
        ],
        "annotations": annotations,
    }


def render(source: Path, out: Path, resolution: int, num_backgrounds: int, quality: int) -> None:
    """Writes `annotations/captions_{train,val}[_small].json`, `train/*.webp` and `val/*.webp` under `out`.

    Args:
        source: Directory of an unpacked `@iconify-json/noto`.
        out: Directory to write to.
        resolution: Pixels of a side.
        num_backgrounds: Pictures of each emoji, of which one is for validation.
        quality: WebP quality, 0 to 100.
    """
    version = json.loads((source / "package.json").read_text(encoding="utf-8"))["version"]
    drawings = load_drawings(source)
    chosen = choose_backgrounds([clash(drawing) for drawing in drawings], num_backgrounds)
    images: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    annotations: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for split in images:
        (out / split).mkdir(parents=True, exist_ok=True)
    for index, (drawing, (val, train)) in enumerate(zip(drawings, chosen, strict=True)):
        for k in (val, *train):
            split = "val" if k == val else "train"
            background = BACKGROUNDS[k]
            image_id = index * len(BACKGROUNDS) + k + 1
            file_name = f"{image_id:012d}.webp"
            colour = "#{:02x}{:02x}{:02x}".format(*background.rgb)
            picture = rasterize(drawing.body, drawing.view, resolution, colour).convert("RGB")
            picture.save(out / split / file_name, quality=quality, method=6)
            images[split].append(
                {
                    "license": 1,
                    "file_name": file_name,
                    "coco_url": "",
                    "height": resolution,
                    "width": resolution,
                    "date_captured": "",
                    "flickr_url": "",
                    "id": image_id,
                }
            )
            for number, caption in enumerate(captions_of(drawing.names, background)):
                annotations[split].append(
                    {"image_id": image_id, "id": image_id * 10 + number, "caption": caption}
                )
    (out / "annotations").mkdir(exist_ok=True)
    for split in images:
        for name, step in (("", 1), ("_small", SMALL_STEP)):
            kept = {image["id"] for image in images[split] if _object_of(image["id"]) % step == 0}
            content = annotation_file(
                [image for image in images[split] if image["id"] in kept],
                [entry for entry in annotations[split] if entry["image_id"] in kept],
                version,
            )
            path = out / "annotations" / f"captions_{split}{name}.json"
            path.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
            logger.info("rendered annotations=%s images=%d", path, len(kept))


def _object_of(image_id: int) -> int:
    """Which of `objects.txt`'s lines a picture shows."""
    return (image_id - 1) // len(BACKGROUNDS)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw named emoji in the layout of COCO captions.")
    parser.add_argument(
        "--source", type=Path, required=True, help="unpacked npm package @iconify-json/noto"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--resolution", type=int, default=128, help="pixels of a side")
    parser.add_argument(
        "--num-backgrounds",
        type=int,
        default=5,
        help="pictures of each emoji (2 to 8), one for val",
    )
    parser.add_argument("--quality", type=int, default=90, help="WebP quality, 0 to 100")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.num_backgrounds <= len(BACKGROUNDS):
        parser.error(
            f"--num-backgrounds {arguments.num_backgrounds}: should be 2 to {len(BACKGROUNDS)}"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    render(
        arguments.source,
        arguments.out,
        arguments.resolution,
        arguments.num_backgrounds,
        arguments.quality,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
