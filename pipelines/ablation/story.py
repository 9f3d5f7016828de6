"""The report of an experiment: ``NAME.md`` with pictures beside it, and ``NAME.html``, which needs no other file.

Every sentence about a result follows by a rule from the numbers, see `paired`; what the experiment's file says is quoted as such.
The same cells give the same report to the byte, whoever makes it. Called by `pipelines.ablate`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines import charts, storage
from pipelines.ablation import dots, figures, sheets
from pipelines.ablation.experiment import METRICS, WAYS
from pipelines.ablation.findings import Findings, Key
from pipelines.ablation.grid import label
from pipelines.ablation.paired import LEVEL, Judged, Spread
from pipelines.grid import png_bytes
from pipelines.markup import cell as text_of
from pipelines.pages import Code, Drawing, Part, Section, Sheet, Text, Titled, markdown_of, page_of
from pipelines.score_tables import Table, size_label

_ABSENT = "-"


def write(found: Findings, folder: str, command: str, failed: Mapping[str, str]) -> list[str]:
    """Writes the report.

    Args:
        found: numbers of the cells.
        folder: where it goes.
        command: that makes it again.
        failed: directory of a cell -> why it could not be made.

    Returns:
        Paths of both pages.

    Raises:
        OSError: a file cannot be written.
    """
    name = found.grid.name
    files = dict(_files(found))
    for file, content in files.items():
        storage.write_atomically(storage.join(folder, file), content)
    told = list(sections(found, files, command, failed))
    title = f"{name.upper()}: {found.grid.experiment.title}"
    paths = [storage.join(folder, f"{name}.{ending}") for ending in ("md", "html")]
    storage.write_atomically(paths[0], markdown_of(title, told).encode())
    storage.write_atomically(paths[1], page_of(title, told, "Made by layered ablate."))
    return paths


def _files(found: Findings) -> Iterator[tuple[str, bytes]]:
    """Drawings and pictures that lie beside the Markdown file."""
    name = found.grid.name
    drawn = figures.judged(found)
    if drawn:
        yield f"{name}.svg", dots.dots_file(drawn)
    if curves := figures.curves(found):
        yield f"{name}-curves.svg", charts.draw_file(curves)
    for ending, sheet in sheets.of_grid(found.grid):
        yield f"{name}-{ending}.png", png_bytes(sheet)


def sections(
    found: Findings, files: Mapping[str, bytes], command: str, failed: Mapping[str, str]
) -> Iterator[Section]:
    """All that is told."""
    yield Section("Question", list(_question(found, failed)))
    yield Section("Conclusions", list(_conclusions(found)))
    yield Section("Numbers", list(_numbers(found)))
    if pictures := list(_pictures(found, files)):
        yield Section("Pictures", pictures)
    yield Section("Cost", list(_cost(found)))
    yield Section("How it was done", list(_made(found, command)))


def _question(found: Findings, failed: Mapping[str, str]) -> Iterator[Part]:
    grid, experiment = found.grid, found.grid.experiment
    yield Text(experiment.question)
    yield Text(f"The paper: {experiment.claim}")
    for factor in experiment.factors.values():
        yield Text(f"Varied: {factor.about} ({'; '.join(factor.levels)}).")
    scale = experiment.scale(grid.options.scale)
    finished = [cell for cell in grid.cells if cell.finished]
    yield Text(
        f"Scale {grid.options.scale} (preset {grid.options.preset or scale.preset}; {scale.takes}); "
        f"{len(grid.combinations)} cells with seeds {', '.join(map(str, grid.seeds))}; "
        f"{len(finished)} of {len(grid.cells)} runs are there. "
        f"Cells are compared with {'; with '.join(found.groups)}."
    )
    for name, other in found.same.items():
        yield Text(f"{name} comes to the very runs of {other}, and is not compared again.")
    if grid.options.scale == "small":
        yield Text(
            "This is the small version: a small network, trained for about a minute on few pictures and scored with "
            "few. It can show a large effect at this size, and says nothing about 512 pixels.",
            "bad",
        )
    for note in experiment.notes:
        yield Text(note)
    for cell in grid.cells:
        if not cell.finished:
            cause = failed.get(cell.path) or failed.get(cell.training.path) or "it was not run"
            yield Text(f"Missing: {cell.label}, seed {cell.seed}: {cause}.", "bad")
    for levels in grid.left_out:
        yield Text(f"Left out, for it needs --data: {label(levels)}.", "bad")


def _conclusions(found: Findings) -> Iterator[Part]:
    """By rule, of the first metric, from the highest resolution down."""
    experiment = found.grid.experiment
    primary = next(iter(experiment.metrics))
    direction = experiment.direction(primary)
    keys = [key for key in found.judged if key[0] == primary]
    if not keys:
        yield Text(
            "No two cells with a number in common are there yet, so nothing can be concluded."
        )
        return
    yield Text(
        f"What follows is derived by a rule from {found.name(primary)} ({METRICS[primary]}; "
        f"{WAYS[direction]}): of each cell the difference to the baseline with the same seed, the "
        f"{LEVEL:.0%} t interval of its mean, and 'better' or 'worse' where the p value is at most "
        f"{1 - LEVEL:.2g} after Holm's correction for all cells that differ from the baseline in the same factors, at that "
        "resolution. 'No difference seen' is not 'no difference': the interval says how large it may be."
    )
    for key in reversed(keys):
        for (cell, baseline), judged in found.judged[key].items():
            against = f"{cell} against {baseline}" if len(found.groups) > 1 else cell
            yield Text(sentence(against, key[1], found.name(primary), judged), "verdict")
    if others := _disagreeing(found, primary):
        yield Text("Other metrics that judge otherwise: " + "; ".join(others) + ".")


def sentence(cell: str, size: str, name: str, judged: Judged) -> str:
    """What a comparison says."""
    mean, low, high, p, count = judged.difference
    where = f"At {size_label(size)}, {cell}" if size else cell[:1].upper() + cell[1:]
    by = f"{name} {_signed(mean)}"
    if judged.verdict == "no spread":
        return f"{where}: no spread ({by}, {_seeds(count)}), so nothing can be said of chance."
    verdict = {"better": "better", "worse": "worse"}.get(judged.verdict, judged.verdict)
    return (
        f"{where}: {verdict} ({by}, {LEVEL:.0%} interval {_signed(low)} to {_signed(high)}, "
        f"p {_p(p)}, corrected {_p(judged.adjusted)}, {_seeds(count)})."
    )


def told(found: Findings) -> str:
    """The conclusions for a terminal."""
    parts = (part.text for part in _conclusions(found) if isinstance(part, Text))
    return "\n".join(parts)


def _disagreeing(found: Findings, primary: str) -> list[str]:
    """Verdicts of other metrics that are the opposite of the first one's."""
    opposite = {("better", "worse"), ("worse", "better")}
    told = []
    for (metric, size), pairs in found.judged.items():
        first = found.judged.get((primary, size), {})
        for pair, judged in pairs.items():
            if pair in first and (first[pair].verdict, judged.verdict) in opposite:
                told.append(
                    f"{found.name(metric)} at {size_label(size)} calls {pair[0]} {judged.verdict} than {pair[1]}"
                )
    return told


def _numbers(found: Findings) -> Iterator[Part]:
    experiment = found.grid.experiment
    drawn = figures.judged(found)
    if drawn:
        dotted = [dots.draw_dots(each) for each in drawn]
        yield Text("A dot is a seed, the bar their mean, the broken line the baseline's mean.")
        yield Drawing(dotted, f"{found.grid.name}.svg", ", ".join(each.title for each in drawn))
    if curves := figures.curves(found):
        lines = [charts.draw_lines(chart) for chart in curves]
        yield Text(
            "A point is a cell's mean over the seeds; bars go from the least to the greatest seed."
        )
        told = ", ".join(chart.title for chart in curves)
        yield Drawing(lines, f"{found.grid.name}-curves.svg", told)
    for metric in experiment.metrics:
        keys = [key for key in found.values if key[0] == metric]
        if not keys:
            continue
        yield Text(
            f"{found.name(metric)}, {METRICS[metric]}: {WAYS[experiment.direction(metric)]}. "
            "Mean ± standard deviation over seeds."
        )
        yield Titled(_means(found, keys))
    for metric, direction in experiment.metrics.items():
        keys = [key for key in found.judged if key[0] == metric]
        if keys and direction != "none":
            yield Titled(
                _differences(found, keys),
                f"{found.name(metric)}: differences to the baseline",
            )
    for metric in experiment.metrics:
        keys = [key for key in found.values if key[0] == metric]
        if keys:
            yield Titled(_each(found, keys), f"{found.name(metric)}: every seed")


def _means(found: Findings, keys: Sequence[Key]) -> Table:
    rows = [
        (cell, *(_spread(found.spread(key, cell)) for key in keys))
        for cell in found.cells
        if any(found.spread(key, cell) for key in keys)
    ]
    return Table(("cell", *(_size(size) for _, size in keys)), rows)


def _differences(found: Findings, keys: Sequence[Key]) -> Table:
    rows: list[tuple[str, ...]] = []
    for _, size in keys:
        for (cell, baseline), judged in found.judged[keys[0][0], size].items():
            mean, low, high, p, count = judged.difference
            ends = _ABSENT if math.isnan(low) else f"{_signed(low)} to {_signed(high)}"
            numbers = (_signed(mean), ends, _p(p), _p(judged.adjusted), str(count))
            rows.append((cell, baseline, _size(size), *numbers, judged.verdict))
    head = (
        "cell",
        "less",
        "at",
        "difference",
        f"{LEVEL:.0%} interval",
        "p",
        "corrected p",
        "seeds",
        "verdict",
    )
    return Table(head, rows)


def _each(found: Findings, keys: Sequence[Key]) -> Table:
    rows = []
    for cell in found.cells:
        for seed in found.grid.seeds:
            numbers = [found.values[key].get(cell, {}).get(seed) for key in keys]
            if any(number is not None for number in numbers):
                rows.append(
                    (cell, str(seed), *(_ABSENT if n is None else f"{n:.6g}" for n in numbers))
                )
    return Table(("cell", "seed", *(_size(size) for _, size in keys)), rows)


def _pictures(found: Findings, files: Mapping[str, bytes]) -> Iterator[Part]:
    names = [file for file in files if file.endswith(".png")]
    if names:
        yield Text(
            f"The same captions in every cell, of seed {found.grid.seeds[0]}; the first ones of the evaluation, not chosen. "
            "The noise is the same where the kind of noise and the highest resolution are."
        )
    if len(sheets.shown_cells(found.grid)) < sum(cell.finished for cell in found.grid.cells):
        yield Text(
            "What was drawn of the data that --data names is not shown here, as such pictures may not be passed on; it lies in "
            "the cells' directories, in grid.png."
        )
    for file in names:
        told = file.removeprefix(f"{found.grid.name}-").removesuffix(".png").replace("px", " px")
        yield Sheet(file, files[file], told, f"Captions and what each cell drew for them, {told}")


def _cost(found: Findings) -> Iterator[Part]:
    head = (
        "cell",
        "pass, MMAC",
        "pictures",
        "training, TMAC",
        "seconds",
        "memory, MiB",
        "drawing, GMAC",
    )
    rows: list[tuple[str, ...]] = []
    for cell in found.cells:
        if cell in found.costs:
            cost = found.costs[cell]
            rows.append(
                (
                    cell,
                    text_of(cost.forward_macs / 1e6),
                    f"{cost.num_images:,.0f}",
                    text_of(cost.training_macs / 1e12),
                    _number(cost.training_seconds),
                    _number(cost.memory_bytes / 2**20),
                    text_of(cost.drawing_macs / 1e9),
                )
            )
    yield Text(
        "A pass is one picture through the network; a training step counts as three passes. Seconds of training are "
        "by the clock, with "
        "other cells beside, so compare multiply-adds first; memory is the most that the worker's process took, "
        "libraries included; "
        "drawing is of one picture. Means over seeds; what a model grew from is included."
    )
    if rows:
        yield Titled(Table(head, rows))
    full = found.grid.experiment.scale("full")
    yield Text(f"The full version (preset {full.preset}) takes: {full.takes}.")
    yield Code(f"layered ablate {found.grid.name} --scale full")


def _made(found: Findings, command: str) -> Iterator[Part]:
    grid = found.grid
    scale = grid.experiment.scale(grid.options.scale)
    yield Text("The same again; what is in the store is not run again:")
    yield Code(command)
    rows: list[tuple[str, ...]] = [(k, _plain(v)) for k, v in scale.overrides.items()]
    rows += [(*override.split("=", 1),) for override in grid.options.overrides]
    yield Titled(
        Table(("setting of all cells", "value"), rows, prose=True), "Settings of the scale"
    )
    levels: list[tuple[str, ...]] = [
        (name, level, _plain(grid.experiment.level(name, level, grid.options.scale)))
        for name, factor in grid.experiment.factors.items()
        for level in factor.levels
    ]
    yield Titled(Table(("factor", "level", "settings"), levels, prose=True), "Levels")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(part)}" for key, part in value.items()) or "as it is"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _size(size: str) -> str:
    return size_label(size) if size else "value"


def _spread(found: Spread | None) -> str:
    if found is None:
        return _ABSENT
    if math.isnan(found.deviation):
        return f"{found.mean:.4g}"
    return f"{found.mean:.4g} ± {found.deviation:.2g}"


def _number(value: float) -> str:
    return _ABSENT if math.isnan(value) else text_of(value)


def _seeds(number: int) -> str:
    return "one seed" if number == 1 else f"{number} seeds"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")


def _p(value: float) -> str:
    return _ABSENT if math.isnan(value) else "below 0.001" if value < 0.001 else f"{value:.2g}"
