"""``layered ablate``: an experiment's cells are trained and evaluated on Ray, and a report says what came of them.

An experiment is a file (`ablation.experiment`); its cells live in one store for all experiments (`ablation.cells`); what is not
there is run, side by side as far as there is room (`ablation.runner`); the report is made from what is there, whether all of it
is or not (`ablation.findings`, `ablation.story`). Run by `cli`.
"""

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipelines import storage
from pipelines.ablation import cells, experiment, findings, pace, runner, story
from pipelines.ablation.experiment import SCALES, ScaleName
from pipelines.ablation.grid import Grid, Options, label
from pipelines.ablation.speed import Speeds
from pipelines.errors import StageFailed, UserError
from pipelines.session import event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked for."""

    experiment: str | None
    "Name or file."
    list: bool
    scale: ScaleName | None
    "None for the one whose preset is asked for, or else the small one."
    preset: str | None
    config: str | None
    seeds: tuple[int, ...] | None
    parallel: int | None
    store: str
    dataset: str | None
    data: str | None
    output: str
    dry_run: bool
    report_only: bool
    overrides: tuple[str, ...]


def run(settings: Settings) -> int:
    """Does what is asked for.

    Returns:
        The exit code.

    Raises:
        UserError: something is wrong with arguments, file or configuration.
        StageFailed: cells are missing; the report is there.
    """
    if settings.list:
        sys.stdout.write("\n".join(_listed()) + "\n")
        return 0
    if settings.experiment is None:
        raise UserError(
            f"give an experiment: {', '.join(experiment.names())}, or a file; --list tells more"
        )
    name, found = experiment.load(settings.experiment)
    options = _options(settings, found)
    measure = not (settings.dry_run or settings.report_only)
    speeds = Speeds(options.store, measure=measure)
    grid = cells.make_grid(name, found, options, speeds)
    if settings.dry_run:
        sys.stdout.write("\n".join(_dry(grid, speeds)) + "\n")
        return 0
    storage.require_writable(storage.absolute(options.store), "store")
    failed: dict[str, str] = {}
    if not settings.report_only:
        failed = runner.run(runner.tasks_of(grid), settings.parallel)
    missing = [cell for cell in grid.cells if not cell.finished]
    if len(missing) == len(grid.cells):
        raise StageFailed(f"no cell is there, so there is nothing to report{_causes(failed)}")
    output = storage.absolute(settings.output)
    storage.require_writable(output, "output")
    if "draw_seconds" in found.metrics and not settings.report_only:
        pace.measure(grid)
    numbers = findings.gather(grid)
    paths = story.write(numbers, output, _again(settings), failed)
    sys.stdout.write(story.told(numbers) + "\n")
    event(logger, "wrote", report=paths[0], page=paths[1], cells=storage.absolute(options.store))
    if missing:
        raise StageFailed(
            f"{len(missing)} of {len(grid.cells)} cells are missing, as the report says{_causes(failed)}; the same "
            "command goes on from here"
        )
    return 0


def _causes(failed: Mapping[str, str]) -> str:
    """The first of several causes."""
    return f": {next(iter(failed.values()))}" if failed else ""


def _again(settings: Settings) -> str:
    """The command that was given, without what changes nothing about the result."""
    words = ["layered", "ablate", str(settings.experiment)]
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in ("scale", "preset", "config", "dataset", "data") and value is not None:
            words += [f"--{field.name}", str(value)]
    if settings.seeds is not None:
        words += ["--seeds", ",".join(map(str, settings.seeds))]
    return shlex.join([*words, *settings.overrides])


def _listed() -> Iterator[str]:
    for name in experiment.names():
        _, found = experiment.load(name)
        yield f"{name}  {found.title}"
        yield f"    {found.question}"
        for scale in SCALES:
            yield f"    {scale}: preset {found.scale(scale).preset}; {found.scale(scale).takes}"


def _options(settings: Settings, found: experiment.Experiment) -> Options:
    data = settings.data and storage.absolute(settings.data)
    if data and not storage.is_directory(data):
        raise UserError(f"--data {settings.data}: there is no such folder")
    scale = settings.scale
    if scale is None:
        presets = {found.scale(name).preset: name for name in reversed(SCALES)}
        scale = presets.get(settings.preset or "", "small")
    return Options(
        scale=scale,
        preset=settings.preset,
        seeds=settings.seeds,
        overrides=settings.overrides,
        config_file=settings.config,
        store=settings.store,
        dataset=settings.dataset,
        data=data,
    )


def _dry(grid: Grid, speeds: Speeds) -> Iterator[str]:
    """Cells, pictures and cost, and what is there already."""
    options = grid.options
    yield f"{grid.name}: {grid.experiment.title}"
    yield f"scale {options.scale}, seeds {', '.join(map(str, grid.seeds))}, store {storage.absolute(options.store)}"
    rows = [("cell", "seed", "pictures", "training", "drawing", "", "directory")]
    for cell in grid.cells:
        trained = cell.training
        each = findings.drawing_macs(trained.config, cell.config)
        state = "finished" if cell.finished else "trained" if trained.finished else "to do"
        rows.append(
            (
                cell.label,
                str(cell.seed),
                f"{sum(part.config.train.num_images for part in trained.chain):,}",
                macs_text(trained.macs),
                macs_text(each * cell.config.evaluate.num_images),
                state,
                cell.path,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    todo = [task for task in runner.tasks_of(grid) if not task.finished()]
    trainings = {cell.training.path: cell.training for cell in grid.cells}
    left = [training for training in trainings.values() if not training.finished]
    total = sum(training.own_macs for training in left)
    yield (
        f"to do: {len(todo)} stages, of which {len(left)} trainings with {macs_text(total)} multiply-adds; a training "
        f"step counts as three passes forward"
    )
    for levels in grid.left_out:
        yield f"left out without --data: {label(levels)}"
    if speeds.guessed:
        yield "pictures of a budget of time are guessed from multiply-adds; the run itself measures"


def macs_text(number: float) -> str:
    """1.23 TMAC."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= size:
            return f"{number / size:.3g} {letter}MAC"
    return f"{number / 1e6:.3g} MMAC"


def settle(values: dict[str, Any]) -> Settings:
    """Settings from what was parsed.

    Raises:
        UserError: seeds that are none.
    """
    found = {field.name: values[field.name] for field in fields(Settings)}
    found["overrides"] = tuple(found["overrides"])
    if (text := found["seeds"]) is not None:
        parts = str(text).split(",")
        if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
            raise UserError(f"--seeds {text}: must be different numbers from 0 on, such as 0,1,2")
        found["seeds"] = tuple(map(int, parts))
    if found["parallel"] is not None and found["parallel"] < 1:
        raise UserError(f"--parallel {found['parallel']}: must be at least 1")
    return Settings(**found)


if __name__ == "__main__":
    from pipelines.cli import main

    raise SystemExit(main(["ablate", *sys.argv[1:]]))
