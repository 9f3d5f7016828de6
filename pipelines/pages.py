"""What is told, put together once as sections of texts, tables, charts and pictures, and then written as a page or as Markdown.

Called by `score_report` and `ablation`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines import gallery, markdown, markup
from pipelines.markup import Element, element
from pipelines.score_tables import Table
from pipelines.style import page_style

SHEET_WIDTH = 1800
"""Pixels that the sheets of pictures are shrunk to."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "note"
    "Class in a page; `bad` for what is wrong."


@dataclass(frozen=True, slots=True)
class Code:
    """A command."""

    text: str


@dataclass(frozen=True, slots=True)
class Titled:
    """A table; where it has a title a page shows it on a click."""

    table: Table
    title: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Charts; in a Markdown file a picture beside it."""

    figures: list[Element]
    file: str
    told: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """A picture beside the result."""

    file: str
    content: bytes | OSError
    told: str
    alt: str


Part = Text | Code | Titled | Drawing | Sheet


@dataclass(frozen=True, slots=True)
class Section:
    """Parts under one heading."""

    title: str
    parts: list[Part]


def page_of(title: str, told: Iterable[Section], footer: str) -> bytes:
    """One page that refers to nothing outside itself."""
    parts = list(elements(told))
    return markup.page(
        title,
        page_style(),
        element("header", element("h1", title)),
        markup.links(parts),
        element("main", *parts),
        element("footer", footer),
    )


def elements(told: Iterable[Section]) -> Iterator[Element]:
    """Sections of a page."""
    for section in told:
        yield markup.section(section.title, *map(_element, section.parts))


def _element(part: Part) -> Element:
    match part:
        case Text(text, kind):
            return markup.note(text, kind)
        case Code(text):
            return element("pre", text)
        case Titled(table, title):
            made = markup.table(table.head, table.rows, prose=table.prose)
            return markup.details(title, made) if title else made
        case Drawing(figures, _, _):
            return markup.grid(figures)
        case Sheet(_, content, told, alt):
            return gallery.figure(content, told, alt, SHEET_WIDTH)


def markdown_of(title: str, told: Iterable[Section]) -> str:
    """The same as Markdown, whose pictures lie beside it."""
    blocks = [markdown.heading(title, 1)]
    for section in told:
        blocks.append(markdown.heading(section.title, 2))
        for part in section.parts:
            blocks += _blocks(part)
    return "\n\n".join(blocks) + "\n"


def _blocks(part: Part) -> Iterator[str]:
    match part:
        case Text(text, kind):
            yield f"**{markdown.escape(text)}**" if kind == "bad" else markdown.paragraph(text)
        case Code(text):
            yield markdown.code(text)
        case Titled(table, title):
            if title:
                yield markdown.heading(title, 3)
            yield markdown.table(table.head, table.rows, prose=table.prose)
        case Drawing(_, file, told):
            yield markdown.picture(file, told)
        case Sheet(file, _, _, alt):
            yield markdown.picture(file, alt)
