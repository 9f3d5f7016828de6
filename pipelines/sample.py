"""Draws pictures of a prompt with the model of a run, at every resolution; needs no Ray.

Picture i is drawn from ``seed + i`` and written as ``<prompt>-<seed>-<resolution>px.png``, which holds in its text chunks
everything that it was drawn from. A contact sheet, ``<prompt>-<first seed>-sheet.png``, shows them all.
"""

import re
import sys
from collections.abc import Sequence

from PIL.Image import Image

from layered_model import LayeredPipeline
from pipelines import cli, storage
from pipelines.config import Config, UserError
from pipelines.grid import contact_sheet, png_bytes
from pipelines.runs import load_model
from pipelines.schema import RunDir
from pipelines.session import Progress

SHEET_PICTURES = 32
"""A contact sheet shows so many at most."""


def check(config: Config) -> list[str]:
    """Refuse what cannot be drawn; say what `run` would do.

    Raises:
        UserError: the run has no model.
    """
    pipeline = _load(config)
    resolutions = ", ".join(map(str, pipeline.resolutions))
    return [
        f"draw pictures of {resolutions} pixels with {RunDir(storage.absolute(config.run)).model}"
    ]


def run(
    config: Config, prompt: str, *, num_images: int = 1, output: str | None = None
) -> list[str]:
    """Draw pictures and return the paths of the files, the contact sheet last.

    Args:
        config: ``run``, ``seed``, ``sample`` and, for how many are drawn together, ``evaluate.batch_size`` are read.
        prompt: what to draw; empty for anything.
        num_images: how many.
        output: directory; the run's ``samples`` for None.

    Raises:
        UserError: the run has no model, its text encoder is not there, or the directory cannot be written.
    """
    if num_images < 1:
        raise UserError(f"num_images={num_images} must be at least 1")
    pipeline = _load(config)
    folder = RunDir(storage.absolute(config.run)).samples
    if output is not None:
        folder = storage.absolute(output)
    storage.require_writable(folder, "output")
    sample, name = config.sample, slug(prompt)
    facts = {
        "prompt": prompt,
        "sampler": sample.sampler,
        "num_steps": str(sample.num_steps),
        "guidance": str(sample.guidance),
        "model_sha256": pipeline.weights_sha256,
    }
    paths: list[str] = []
    shown: dict[int, list[Image]] = {resolution: [] for resolution in pipeline.resolutions}
    with Progress("sample", num_images, "images") as progress:
        for start in range(0, num_images, config.evaluate.batch_size):
            prompts = [prompt] * min(config.evaluate.batch_size, num_images - start)
            drawn = pipeline(
                prompts,
                seed=config.seed + start,
                num_steps=sample.num_steps,
                guidance=sample.guidance,
                sampler=sample.sampler,
            )
            for resolution, pictures in drawn.images.items():
                shown[resolution] += pictures[: SHEET_PICTURES - start]
                for seed, picture in zip(drawn.seeds, pictures, strict=True):
                    path = storage.join(folder, f"{name}-{seed}-{resolution}px.png")
                    storage.write_atomically(path, png_bytes(picture, facts | {"seed": str(seed)}))
                    paths.append(path)
            progress.update(len(prompts))
    captions = [
        f"{prompt} (seed {config.seed + i})" for i in range(min(num_images, SHEET_PICTURES))
    ]
    sheet = contact_sheet(captions, shown, blocks=-(-len(captions) // 8))
    path = storage.join(folder, f"{name}-{config.seed}-sheet.png")
    storage.write_atomically(path, png_bytes(sheet, facts | {"seed": str(config.seed)}))
    paths.append(path)
    sys.stdout.write("\n".join(paths) + "\n")
    return paths


def slug(prompt: str) -> str:
    """Letters and digits of a prompt joined by hyphens, short enough for a file's name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "untitled"


def _load(config: Config) -> LayeredPipeline:
    """The run's model, with its text encoder."""
    pipeline = load_model(config)
    try:
        _ = pipeline.text_encoder
    except ValueError as error:
        raise UserError(f"run={config.run!r}: {error}") from error
    return pipeline


def main(argv: Sequence[str] | None = None) -> int:
    """``layered sample``."""
    return cli.main(["sample", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
