"""``layered export``: the averaged weights of a checkpoint as a model's directory, of a run that goes on or has ended.

Training writes ``RUN/model`` at its end. Before that, and for checkpoints that were kept, this makes what
`layered_model.LayeredPipeline.from_pretrained` loads. Starts no Ray.
"""

import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from layered_model import checkpoint
from layered_model.checkpoint import TEXT_ENCODER, ModelConfig
from layered_model.text import EncoderInfo
from pipelines import snapshots, storage
from pipelines.checkpoints import Store
from pipelines.errors import UserError
from pipelines.schema import RunDir
from pipelines.session import event

logger = logging.getLogger(__name__)


def run(
    run: str,
    output: str | None = None,
    num_images: int | None = None,
    *,
    ema_width: float | None = None,
    with_text_encoder: bool = False,
) -> str:
    """Writes a model.

    Args:
        run: directory of the run.
        output: the model's directory; by default ``RUN/model``, and ``RUN/model_WIDTH`` of another width.
        num_images: pictures seen by the checkpoint that is taken; by default the newest that is sound.
        ema_width: relative width of an average of the snapshots of ``train.ema_snapshot_widths``; by default training's.
        with_text_encoder: puts the text encoder beside the network, so that the directory is all that drawing needs.

    Returns:
        The model's directory.

    Raises:
        UserError: there is no such checkpoint, or it is damaged; the text encoder is not to be had, or not that of training.
    """
    layout = RunDir(storage.absolute(run))
    if ema_width is None:
        config, weights = _of_checkpoint(run, layout, num_images)
        path = layout.model
    else:
        config, weights = snapshots.reconstruct(layout, ema_width, num_images)
        path = f"{layout.model}_{ema_width}"
    if output is not None:
        path = storage.absolute(output)
    with tempfile.TemporaryDirectory(prefix="export-") as directory:
        encoder = None
        if with_text_encoder:
            encoder = Path(directory, TEXT_ENCODER)
            _copy_text_encoder(config.text, encoder, storage.join(path, TEXT_ENCODER))
        for name, content in checkpoint.encode(config, weights, encoder).items():
            storage.write_atomically(storage.join(path, name), content)
    event(logger, "wrote", model=path, images=config.num_images_trained)
    return path


def _of_checkpoint(
    run: str, layout: RunDir, num_images: int | None
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Configuration and averaged weights."""
    store = Store(layout.checkpoints)
    found = [about.num_images for about in store.all()]
    if num_images is not None and num_images not in found:
        there = f"those are {', '.join(map(str, found))}" if found else "there are none"
        raise UserError(
            f"--num-images {num_images}: {store.directory} has no such checkpoint; {there}"
        )
    try:
        state = store.read_newest() if num_images is None else store.read(num_images)
    except (OSError, ValueError) as error:
        raise UserError(f"run={run!r}: {error}; choose another with --num-images") from error
    if state is None:
        raise UserError(
            f"run={run!r}: {store.directory} holds no checkpoint that is sound; "
            "`layered train` writes the first after train.checkpoint_every_images pictures"
        )
    return ModelConfig.from_dict(state["model"]), state["averages"][0]["weights"]


def _copy_text_encoder(info: EncoderInfo, local: Path, path: str) -> None:
    """Writes the encoder to a directory here, and its files in place of what is at the path."""
    try:
        checkpoint.load_text_encoder(info).save_pretrained(local)
    except ValueError as error:
        raise UserError(f"--with-text-encoder: {error}") from error
    storage.remove_directory(path)
    for file in sorted(file for file in local.rglob("*") if file.is_file()):
        name = file.relative_to(local).as_posix()
        storage.write_atomically(storage.join(path, name), file.read_bytes())


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["export", *sys.argv[1:]]))
