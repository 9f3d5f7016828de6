"""How far the prompt of the upper layers decides what is drawn, band by band.

Three cells draw with the same seeds: every layer by its own caption (a), every layer by another picture's (b), and some layers by
the one and some by the other (m). Each layer of the model has a band of the picture, what its resolution holds beyond the one
below. In a band, over all pictures,

    share = <m - a, b - a> / <b - a, b - a>

is 0 where the mixed picture is that of the own caption, and 1 where it is that of the other. It says nothing about whether either
is any good. Called by `findings`.
"""

import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layered_model.images import to_float
from layered_model.resample import Kernel, downscale, upscale
from pipelines import storage
from pipelines.ablation.grid import Cell, Grid


def shares(grid: Grid) -> Iterator[tuple[str, int, str, float]]:
    """Of every cell whose layers follow different captions, and whose model drew with either caption alone too.

    Yields:
        The cell, its seed, the band as the resolution of its layer, the share.
    """
    drawn = [cell for cell in grid.cells if cell.finished]
    for cell in drawn:
        offsets = cell.config.evaluate.layer_captions
        if len(set(offsets)) < 2:
            continue
        own, other = (_alone(drawn, cell, offset) for offset in (offsets[0], offsets[-1]))
        if own is None or other is None:
            continue
        layers = cell.training.config.model.layers
        kernel = cell.training.config.diffusion.kernel
        a, m, b = (kept_pictures(one, layers[-1]) for one in (own, cell, other))
        for layer, share in zip(layers, band_shares(a, m, b, layers, kernel), strict=True):
            yield cell.label, cell.seed, str(layer), share


def _alone(cells: Sequence[Cell], mixed: Cell, offset: int) -> Cell | None:
    """The cell of the same model whose layers all follow one caption."""
    for cell in cells:
        offsets = set(cell.config.evaluate.layer_captions) or {0}
        same = (
            cell.config.sample == mixed.config.sample and cell.training.path == mixed.training.path
        )
        if same and offsets == {offset}:
            return cell
    return None


def kept_pictures(cell: Cell, resolution: int) -> Tensor:
    """Pictures that an evaluation kept, uint8 [n, r, r, 3]; none where it kept none."""
    folders = [name for name in storage.list_directory(cell.path) if name.startswith("pictures-")]
    found = []
    for folder in sorted(folders):
        path = storage.join(cell.path, folder, str(resolution))
        names = sorted(storage.list_directory(path))
        for content in storage.read_each([storage.join(path, name) for name in names]):
            if isinstance(content, OSError):
                raise content
            with Image.open(io.BytesIO(content)) as picture:
                found.append(np.asarray(picture.convert("RGB")))
    if not found:
        return torch.empty(0, resolution, resolution, 3, dtype=torch.uint8)
    return torch.from_numpy(np.stack(found))


def band_shares(
    own: Tensor, mixed: Tensor, other: Tensor, layers: Sequence[int], kernel: Kernel
) -> list[float]:
    """The share in each layer's band, low to high.

    Args:
        own: pictures of the own captions, uint8 [n, r, r, 3].
        mixed: of both.
        other: of the other captions.
        layers: resolutions of the model, of which r is the highest.
        kernel: how the model downscales.
    """
    a, m, b = (_bands(to_float(pictures), layers, kernel) for pictures in (own, mixed, other))
    found = []
    for a_band, m_band, b_band in zip(a, m, b, strict=True):
        apart = b_band - a_band
        found.append(float(((m_band - a_band) * apart).sum() / apart.square().sum()))
    return found


def _bands(x0: Tensor, layers: Sequence[int], kernel: Kernel) -> list[Tensor]:
    """What each resolution holds beyond the one below."""
    sizes = [downscale(x0, resolution, kernel) for resolution in layers]
    above = [high - upscale(low, high.shape[-1], kernel) for low, high in itertools.pairwise(sizes)]
    return [sizes[0], *above]
