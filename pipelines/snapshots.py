"""Averaged weights of any width, made after training from snapshots of a few.

How long weights should be averaged depends on what is done with them, and is known only when they can be scored. With
``train.ema_snapshot_widths`` set, training tracks an average of each of these widths and keeps it at every checkpoint;
`reconstruct` turns what was kept into the average of another width (see `layered_model.ema`). A snapshot is a model's directory
of its own, as large as the model: ``RUN/snapshots/000250000_0.05``. Called by `trainer` and `export`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from layered_model import checkpoint
from layered_model.checkpoint import ModelConfig
from layered_model.ema import Profile, combine, reconstruction
from pipelines import storage
from pipelines.config import UserError
from pipelines.schema import RunDir


def save(
    layout: RunDir, config: ModelConfig, averages: Iterable[tuple[float, Mapping[str, Tensor]]]
) -> None:
    """Keeps averages, each a relative width and weights, with ``config`` saying after how many pictures."""
    for width, weights in averages:
        name = f"{config.num_images_trained:012d}_{width}"
        for file, content in checkpoint.encode(config, weights).items():
            storage.write_atomically(storage.join(layout.snapshots, name, file), content)


def reconstruct(
    layout: RunDir, relative_width: float, num_images: int | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model with an average of another width.

    Args:
        layout: of a run that kept snapshots.
        relative_width: in (0, 0.28]; near or between the widths that were tracked it is most exact.
        num_images: after how many pictures; by default at the last snapshot.

    Returns:
        Its configuration and weights.

    Raises:
        UserError: there are no snapshots, the width is impossible, or the pictures are more than the last snapshot's.
    """
    found = sorted(_snapshots(layout))
    if not found:
        raise UserError(
            f"{layout.snapshots} holds no snapshots; train with train.ema_snapshot_widths=[0.05,0.1]"
        )
    last = storage.join(layout.snapshots, found[-1])
    config = checkpoint.load(last)[0]
    at = config.num_images_trained if num_images is None else num_images
    profiles = [Profile(float(n.split("_")[1]), int(n.split("_")[0])) for n in found]
    try:
        shares = reconstruction(profiles, Profile(relative_width, at))
    except ValueError as error:
        raise UserError(f"--ema-width {relative_width}: {error}") from error
    config = dataclasses.replace(config, num_images_trained=at)
    return config, combine(shares, _weights(layout, found))


def _snapshots(layout: RunDir) -> list[str]:
    """Names of the snapshots that were written to their end."""
    return [
        name
        for name in storage.list_directory(layout.snapshots)
        if storage.exists(storage.join(layout.snapshots, name, checkpoint.CONFIG_FILE))
    ]


def _weights(layout: RunDir, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    return (checkpoint.load(storage.join(layout.snapshots, name))[1] for name in names)
