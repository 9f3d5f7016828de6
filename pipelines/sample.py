"""Draws pictures of a prompt with the model of a run, at every resolution, or lets a server draw them; needs no Ray.

Picture i is drawn from ``seed + i`` and written as ``<prompt>-<seed>-<resolution>px.png``, which holds in its text chunks
everything that it was drawn from. A contact sheet, ``<prompt>-<first seed>-sheet.png``, shows them all. A server draws each
picture at one resolution, and its files are kept as they come.
"""

import io
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL.Image import Image
from PIL.PngImagePlugin import PngImageFile

from layered_model import LayeredPipeline
from pipelines import cli, storage
from pipelines.config import Config, UserError
from pipelines.errors import StageFailed
from pipelines.grid import contact_sheet, png_bytes
from pipelines.runs import load_model, model_directory
from pipelines.schema import RunDir
from pipelines.serving.answers import EncodedPicture, EncodedPreview, ServedModel
from pipelines.serving.client import KEY_VARIABLE, Client
from pipelines.session import Progress, event

logger = logging.getLogger(__name__)

SHEET_PICTURES = 32
"""A contact sheet shows so many at most."""

SEED_BITS = 32
"""Of seeds that are drawn at random: short enough to be typed again."""

NUM_PREVIEWS = 3
"""Of each picture of a server, which show that it goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """Pictures for a server to draw. What is None is left to the server, but for the seed."""

    server: str
    "URL, http or https."
    prompt: str
    "What to draw; empty for anything."
    num_images: int
    "How many."
    seed: int | None
    "Of the first picture; drawn at random for None."
    num_steps: int | None
    "Steps of each."
    guidance: float | None
    "How far to follow the prompt."
    size: int | None
    "Pixels of a side, one of the model's resolutions; the highest for None."
    output: str | None
    "Directory; samples/ for None."


def check(config: Config) -> list[str]:
    """Refuse what cannot be drawn; say what `run` would do.

    Raises:
        UserError: the run has no model.
    """
    pipeline = _load(config)
    resolutions = ", ".join(map(str, pipeline.resolutions))
    return [f"draw pictures of {resolutions} pixels with {model_directory(config.run)}"]


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
    _require_some(num_images)
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
                **sample.arguments,
            )
            for resolution, pictures in drawn.images.items():
                shown[resolution] += pictures[: SHEET_PICTURES - start]
                for seed, picture in zip(drawn.seeds, pictures, strict=True):
                    path = storage.join(folder, f"{name}-{seed}-{resolution}px.png")
                    storage.write_atomically(path, png_bytes(picture, facts | {"seed": str(seed)}))
                    paths.append(path)
            progress.update(len(prompts))
    paths.append(_write_sheet(folder, prompt, config.seed, shown, facts))
    sys.stdout.write("\n".join(paths) + "\n")
    event(logger, "wrote", images=len(paths) - 1, sheet=paths[-1])
    return paths


def check_remote(remote: Remote) -> list[str]:
    """Refuse what the server cannot draw; say what `run_remote` would do.

    Raises:
        UserError: see `run_remote`.
        StageFailed: see `run_remote`.
    """
    with _client(remote) as client:
        model = client.model()
        resolution, folder = _settle(remote, model)
        return [
            f"draw {remote.num_images} pictures of {resolution} pixels with the model {model.name} of {client.url} "
            f"({model.weights_sha256[:12]}), into {folder}"
        ]


def run_remote(remote: Remote) -> list[str]:
    """Let a server draw pictures; return the paths of the files, the contact sheet last.

    Raises:
        UserError: the server refuses it, or is none, or the directory cannot be written.
        StageFailed: the server cannot be reached, or fails; the pictures that were done are written.
    """
    seed = secrets.randbits(SEED_BITS) if remote.seed is None else remote.seed
    paths, shown = dict[int, str](), dict[int, PngImageFile]()
    with _client(remote) as client:
        model = client.model()
        resolution, folder = _settle(remote, model)
        storage.require_writable(folder, "output")
        event(logger, "sample", seed=seed, server=client.url, model=model.name)
        with Progress("sample", remote.num_images, "images") as progress:
            for number, drawn in _ask(client, remote, model, seed, resolution):
                taken = drawn.step if isinstance(drawn, EncodedPreview) else drawn.num_steps
                told = {"seed": drawn.seed, "step": f"{taken}/{drawn.num_steps}"}
                if isinstance(drawn, EncodedPreview):
                    progress.update(0, **told)
                    continue
                picture = _opened(drawn.content, resolution, client.url)
                file = f"{slug(remote.prompt)}-{drawn.seed}-{resolution}px.png"
                paths[number] = storage.join(folder, file)
                storage.write_atomically(paths[number], drawn.content)
                if number < SHEET_PICTURES:
                    shown[number] = picture
                progress.update(1, **told)
    pictures = [shown[number] for number in sorted(shown)]
    sheet = _write_sheet(folder, remote.prompt, seed, {resolution: pictures}, pictures[0].text)
    ordered = [*(paths[number] for number in sorted(paths)), sheet]
    sys.stdout.write("\n".join(ordered) + "\n")
    return ordered


def slug(prompt: str) -> str:
    """Letters and digits of a prompt joined by hyphens, short enough for a file's name."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].rstrip("-") or "untitled"


def _require_some(num_images: int) -> None:
    if num_images < 1:
        raise UserError(f"num_images={num_images} must be at least 1")


def _write_sheet(
    folder: str,
    prompt: str,
    seed: int,
    shown: Mapping[int, Sequence[Image]],
    facts: Mapping[str, str],
) -> str:
    """Write the contact sheet of pictures that are drawn from a seed on; return its path."""
    count = len(next(iter(shown.values())))
    captions = [f"{prompt} (seed {seed + i})" for i in range(count)]
    sheet = contact_sheet(captions, shown, blocks=-(-count // 8))
    path = storage.join(folder, f"{slug(prompt)}-{seed}-sheet.png")
    storage.write_atomically(path, png_bytes(sheet, {**facts, "seed": str(seed)}))
    return path


def _client(remote: Remote) -> Client:
    return Client(remote.server, os.environ.get(KEY_VARIABLE) or None)


def _settle(remote: Remote, model: ServedModel) -> tuple[int, str]:
    """The resolution to draw at, and the directory to write to."""
    _require_some(remote.num_images)
    if remote.size is not None and remote.size not in model.resolutions:
        known = ", ".join(map(str, model.resolutions))
        raise UserError(f"size={remote.size} must be one of {known}, as {model.name} draws")
    folder = storage.absolute("samples" if remote.output is None else remote.output)
    return remote.size or model.resolutions[-1], folder


def _ask(
    client: Client, remote: Remote, model: ServedModel, seed: int, resolution: int
) -> Iterator[tuple[int, EncodedPreview | EncodedPicture]]:
    """Asks for as many pictures at once as the server allows; numbers them from 0."""
    for start in range(0, remote.num_images, model.max_images):
        for drawn in client.draw(
            remote.prompt,
            seed=seed + start,
            num_images=min(model.max_images, remote.num_images - start),
            resolution=resolution,
            num_steps=remote.num_steps,
            guidance=remote.guidance,
            num_previews=min(NUM_PREVIEWS, model.max_previews),
            model=model.name,
        ):
            yield start + drawn.image_index, drawn


def _opened(content: bytes, resolution: int, server: str) -> PngImageFile:
    """A picture that a server sent.

    Raises:
        StageFailed: it is none, or of another size.
    """
    try:
        picture = PngImageFile(io.BytesIO(content))
        sound = picture.size == (resolution, resolution)
        if sound:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        sound = False
    if not sound:
        raise StageFailed(f"{server} sent what is no PNG picture of {resolution} pixels")
    return picture


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
