"""Sheets of pictures: the same captions and seeds, a row each, with every cell's picture beside the others'.

Called by `story`.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from layered_model.diffusion import LayeredDiffusion
from pipelines.ablation.control import kept_pictures
from pipelines.ablation.experiment import needs_data
from pipelines.ablation.grid import Cell, Grid
from pipelines.dataset import PreparedDataset
from pipelines.drawing import choose_captions, real_pictures, texts_of
from pipelines.grid import side_by_side

NUM_CAPTIONS = 6


def of_grid(grid: Grid) -> Iterator[tuple[str, Image.Image]]:
    """A sheet for each data set and resolution, the highest first, of the first seed that has any; each with a name.

    What ``--data`` names is left out: a report is passed on, and those pictures may not be.
    """
    for seed in grid.seeds:
        drawn = [cell for cell in shown_cells(grid) if cell.seed == seed]
        if not drawn:
            continue
        groups: dict[str, list[Cell]] = {}
        for cell in drawn:
            groups.setdefault(cell.training.dataset.path, []).append(cell)
        for number, cells in enumerate(groups.values(), 1):
            ending = f"-data{number}" if len(groups) > 1 else ""
            layers = {size for cell in cells for size in cell.training.config.model.layers}
            for size in sorted(layers, reverse=True):
                yield f"{size}px{ending}", _sheet(cells, size)
        return


def shown_cells(grid: Grid) -> list[Cell]:
    """The finished cells whose pictures are in a report."""
    found, scale = grid.experiment, grid.options.scale
    return [
        cell
        for cell in grid.cells
        if cell.finished
        and not needs_data([found.level(*pair, scale) for pair in cell.levels.items()])
    ]


def _sheet(cells: Sequence[Cell], size: int) -> Image.Image:
    """What cells of one data set drew at a resolution, beside the real pictures."""
    first = cells[0]
    options = first.config.evaluate
    dataset = PreparedDataset.open(first.training.dataset.path)
    chosen = choose_captions(dataset, options.split, options.num_images, first.config.seed)
    chosen = chosen[: min(NUM_CAPTIONS, *(cell.config.evaluate.num_kept for cell in cells))]
    columns = {"real": _real(cells, size, dataset, [caption.row for caption in chosen])}
    shown: set[str] = set()  # what are the same runs, once
    for cell in cells:
        if size in cell.training.config.model.layers and cell.path not in shown:
            shown.add(cell.path)
            columns[" / ".join(cell.levels.values())] = list(
                kept_pictures(cell, size)[: len(chosen)].numpy()
            )
    return side_by_side(texts_of(dataset, options.split, chosen), columns)


def _real(
    cells: Sequence[Cell], size: int, dataset: PreparedDataset, rows: list[int]
) -> list[UInt8[ndarray, "h w 3"]]:
    """The split's own pictures, downscaled as the first cell that draws this resolution does it."""
    trained = next(
        cell.training.config for cell in cells if size in cell.training.config.model.layers
    )
    diffusion = LayeredDiffusion(trained.diffusion, trained.model.layers)
    found = real_pictures(diffusion, dataset, cells[0].config.evaluate.split, rows)
    return list(found[size])
