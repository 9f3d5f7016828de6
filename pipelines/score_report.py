"""The evaluation of a run for people to read: ``evaluation.md``, ``evaluation.html``, and the same in `report`'s page.

What is told is put together once, as sections of texts, tables, charts and pictures, and then written in either form. It trusts
nothing: captions are text whatever they hold, and what a result lacks, or has in another form, is left out. The files depend on
the result alone, so the same evaluation gives the same bytes. Called by `evaluate` and `report`.
"""

import posixpath
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines import charts, markup, pages, score_tables, storage, sweeps
from pipelines.pages import Code, Drawing, Part, Section, Sheet, Text, Titled
from pipelines.schema import RunDir
from pipelines.score_tables import Table, finite, mapping, with_half, with_interval

_WIDTH = 100  # of what is shown in a terminal

Sheets = Mapping[str, bytes | OSError]
"Pictures beside the result: name of the file and what it holds; where it cannot be read, why."


_SCORES, _SWEEP = "Scores", "Guidance and steps"
_NEAREST, _MADE = "Nearest training pictures", "How it was evaluated"
TITLES = _SCORES, _SWEEP, _NEAREST, _MADE
"""Of all sections that there can be."""


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal: the table in the paper's shape, yardsticks, number of pictures, warnings."""
    tree = score_tables.read_scores(mapping(result, "scores"))
    head, rows, _ = score_tables.headline(tree, with_half)
    directions = ("", *map(score_tables.direction, score_tables.columns(tree)))
    lines = [*rows, *score_tables.yardsticks(tree, with_half).rows]
    text = _aligned([head, directions, *lines]) if lines else ["no scores"]
    notes = [score_tables.summary(mapping(result, "settings"))]
    if any("±" in value for row in lines for value in row):
        notes.append(f"± is half of the {score_tables.INTERVAL}")
    if (sweep := sweeps.read(result)) is not None:
        notes.append(sweeps.lowest(sweep))
    notes += [f"warning: {warning}" for warning in score_tables.warnings_of(result)]
    for note in filter(None, notes):
        text += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
    return "\n".join(text)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of columns: the first begins at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_all(layout: RunDir, result: Mapping[str, Any], *, command: str | None = None) -> None:
    """Writes ``evaluation.md``, ``evaluation.html`` and ``sweep.svg`` of a run whose pictures are there.

    Args:
        layout: the run's directory.
        result: as it goes into ``metrics.json``.
        command: that makes it again, if that is known.

    Raises:
        OSError: a file cannot be written.
    """
    sheets = read_sheets(layout)
    name = f"{posixpath.basename(layout.path)}: evaluation"
    drawing = sweep_svg(result)
    if drawing is None:
        storage.remove(layout.sweep)
    else:
        storage.write_atomically(layout.sweep, drawing)
    text = markdown_of(result, sheets, title=name, command=command)
    storage.write_atomically(layout.evaluation_md, text.encode())
    made = page(result, sheets, title=name, command=command)
    storage.write_atomically(layout.evaluation_html, made)


def read_sheets(layout: RunDir) -> dict[str, bytes | OSError]:
    """The pictures that an evaluation left."""
    paths = (layout.grid, layout.nearest)
    contents = zip(paths, storage.read_each(paths), strict=True)
    return {
        posixpath.basename(path): content
        for path, content in contents
        if not isinstance(content, FileNotFoundError)
    }


def sweep_svg(result: Mapping[str, Any]) -> bytes | None:
    """The charts of the sweep as a file of their own; None where there is nothing to draw."""
    sweep = sweeps.read(result)
    drawn = sweeps.charts(sweep) if sweep is not None else []
    return charts.draw_file(drawn) if drawn else None


def sections(
    result: Mapping[str, Any], sheets: Sheets, command: str | None = None
) -> Iterator[Section]:
    """All that is told; no section is without a part."""
    made = (
        Section(_SCORES, list(_scores(result, sheets))),
        Section(_SWEEP, list(_sweep(result))),
        Section(_NEAREST, list(_nearest(result, sheets))),
        Section(_MADE, list(_made(result, command))),
    )
    return (section for section in made if section.parts)


def _scores(result: Mapping[str, Any], sheets: Sheets) -> Iterator[Part]:
    tree = score_tables.read_scores(mapping(result, "scores"))
    if summary := score_tables.summary(mapping(result, "settings")):
        yield Text(f"{summary}.")
    headline = score_tables.headline(tree, with_interval)
    if headline.rows:
        yield Titled(headline)
    yardsticks = score_tables.yardsticks(tree, with_interval)
    if yardsticks.rows:
        yield Titled(yardsticks)
    columns = score_tables.columns(tree)
    told = [f"{score_tables.label(name)}: {score_tables.direction(name)}." for name in columns]
    if any(" to " in cell for row in headline.rows for cell in row):
        told.append(f"In parentheses the {score_tables.INTERVAL}.")
    if told:
        yield Text(" ".join(told))
    for warning in score_tables.warnings_of(result):
        yield Text(warning, "bad")
    if tree:
        yield Titled(score_tables.everything(tree, with_interval), "All scores")
    if "grid.png" in sheets:
        alt = "Captions and what was drawn for them, in the evaluation"
        yield Sheet("grid.png", sheets["grid.png"], "Drawn in the evaluation", alt)


def _sweep(result: Mapping[str, Any]) -> Iterator[Part]:
    sweep = sweeps.read(result)
    if sweep is None:
        return
    drawn = sweeps.charts(sweep)
    if drawn:
        number = finite(mapping(result, "settings").get("num_images"))
        of = f" of {number:,.0f} pictures" if number is not None else ""
        yield Text(f"Each point is a setting{of}; bars are 95 % intervals.")
        told = ", ".join(chart.title for chart in drawn)
        yield Drawing([charts.draw_lines(chart) for chart in drawn], "sweep.svg", told)
    if lowest := sweeps.lowest(sweep):
        yield Text(lowest)
    for title, table in sweeps.tables(sweep, with_interval):
        yield Titled(table, title)


def _nearest(result: Mapping[str, Any], sheets: Sheets) -> Iterator[Part]:
    memorisation = mapping(result, "memorisation")
    if not memorisation:
        return
    if sentence := score_tables.memorisation_sentence(memorisation):
        yield Text(sentence)
    if "nearest.png" in sheets:
        yield Sheet(
            "nearest.png",
            sheets["nearest.png"],
            "At the left what was drawn, then the training pictures nearest to it",
            "Drawn pictures, each beside the training pictures nearest to it",
        )
    pairs = score_tables.pairs(memorisation)
    if pairs.rows:
        yield Titled(pairs, "Pairs")


def _made(result: Mapping[str, Any], command: str | None) -> Iterator[Part]:
    settings = markup.flatten(mapping(result, "settings"))
    rows: list[tuple[str, ...]] = [(name, str(value)) for name, value in settings]
    if rows:
        yield Titled(Table(("setting", "value"), rows, prose=True), "Settings")
    if command is not None:
        yield Text("The same again:")
        yield Code(command)


def page(
    result: Mapping[str, Any],
    sheets: Sheets,
    *,
    title: str = "Evaluation",
    command: str | None = None,
) -> bytes:
    """``evaluation.html``: one page that refers to nothing outside itself."""
    told = sections(result, sheets, command=command)
    return pages.page_of(title, told, "Made by layered evaluate.")


def markdown_of(
    result: Mapping[str, Any],
    sheets: Sheets,
    *,
    title: str = "Evaluation",
    command: str | None = None,
) -> str:
    """``evaluation.md``, whose pictures lie beside it."""
    return pages.markdown_of(title, sections(result, sheets, command=command))
