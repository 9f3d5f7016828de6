"""How long the cells of an experiment take to draw a picture.

All cells of the first seed draw the same few captions in turns, with the threads or the GPU of one sampler, and the median of the
rounds counts (see `costs`): the evaluations themselves ran beside others, so that their clocks say little. What was measured lies
in the cell's directory. Called by `pipelines.ablate`.
"""

import functools
import json
import logging

import torch

from layered_model import LayeredPipeline
from pipelines import costs, storage
from pipelines.ablation.grid import Cell, Grid
from pipelines.dataset import PreparedDataset
from pipelines.drawing import choose_captions, draw
from pipelines.schema import RunDir
from pipelines.session import event, warning

logger = logging.getLogger(__name__)

FILE = "draw_seconds.json"
"""In a cell's directory."""
NUM_IMAGES = 4
"""Pictures drawn together."""
REPEATS, WARM_UP = 3, 1


def measure(grid: Grid) -> None:
    """Measures all finished cells of the first seed, unless all have been; where there is no GPU for it, says so."""
    cells = [cell for cell in grid.cells if cell.seed == grid.seeds[0] and cell.finished]
    if all(storage.exists(storage.join(cell.path, FILE)) for cell in cells):
        return
    use_gpu = any(cell.config.train.use_gpu for cell in cells)
    if use_gpu and not torch.cuda.is_available():
        warning(logger, "not_measured", what="seconds of drawing", reason="no GPU is here")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cells[0].config.evaluate.cpus_per_sampler)))
    try:
        taken = costs.rounds(
            {cell.path: _job(cell) for cell in cells},
            repeats=REPEATS,
            warm_up=WARM_UP,
            synchronize=torch.cuda.synchronize if use_gpu else lambda: None,
        )
    finally:
        torch.set_num_threads(threads)
        _pipeline.cache_clear()
    for path, seconds in taken.items():
        spread = costs.Spread.of([value / NUM_IMAGES for value in seconds])
        content = {
            "seconds": spread.median,
            "quartiles": [spread.low, spread.high],
            "pictures_together": NUM_IMAGES,
            "device": torch.cuda.get_device_name() if use_gpu else costs.processor(),
        }
        storage.write_atomically(storage.join(path, FILE), json.dumps(content, indent=1).encode())
    event(logger, "measured", cells=len(taken), what="seconds of drawing")


def _job(cell: Cell) -> costs.Job:
    config, options = cell.config, cell.config.evaluate
    device = "cuda" if config.train.use_gpu else "cpu"
    pipeline = _pipeline(RunDir(cell.training.path).model, device)
    dataset = PreparedDataset.open(cell.training.dataset.path)
    captions = choose_captions(dataset, options.split, NUM_IMAGES, config.seed)
    return lambda: draw(pipeline, dataset, options.split, captions, config.sample, NUM_IMAGES)


@functools.cache
def _pipeline(path: str, device: str) -> LayeredPipeline:
    """A model, once for all cells that draw with it."""
    return LayeredPipeline.from_pretrained(path, device)
