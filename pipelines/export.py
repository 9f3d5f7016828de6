"""``layered export``: the averaged weights of a checkpoint as a model's directory, of a run that goes on or has ended.

Training writes ``RUN/model`` at its end. Before that, and for checkpoints that were kept, this makes what
`layered_model.LayeredPipeline.from_pretrained` loads. Starts no Ray.
"""

import logging
import sys

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig
from pipelines import storage
from pipelines.checkpoints import Store
from pipelines.errors import UserError
from pipelines.schema import RunDir
from pipelines.session import event

logger = logging.getLogger(__name__)


def run(run: str, output: str | None = None, num_images: int | None = None) -> str:
    """Writes a model.

    Args:
        run: directory of the run.
        output: the model's directory; by default ``RUN/model``.
        num_images: pictures seen by the checkpoint that is taken; by default the newest that is sound.

    Returns:
        The model's directory.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    layout = RunDir(storage.absolute(run))
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
    config = ModelConfig.from_dict(state["model"])
    path = layout.model if output is None else storage.absolute(output)
    for name, content in checkpoint.encode(config, state["averages"][0]["weights"]).items():
        storage.write_atomically(storage.join(path, name), content)
    event(logger, "wrote", model=path, images=config.num_images_trained)
    return path


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["export", *sys.argv[1:]]))
