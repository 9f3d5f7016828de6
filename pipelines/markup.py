"""Elements of HTML and of the SVG inside it, tables, sections, whole pages and drawings.

Text and attributes are escaped by the serializer, so nothing that is put into a page can become markup. Called by `charts` and by
those who make pages.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from xml.etree import ElementTree

Element = ElementTree.Element

_END_OF_VOID = re.compile("</(?:img|meta)>")
"""HTML's elements without an end; no text can hold this, for its "<" is escaped."""
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An element with what is inside it, in order.

    Args:
        tag: its name.
        children: elements and text.
        attributes: ``class_`` means class, ``aria_label`` means aria-label; None leaves one out.
    """
    found = {
        name.rstrip("_").replace("_", "-"): legal(str(value))
        for name, value in attributes.items()
        if value is not None
    }
    made = Element(tag, found)
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                made.text = (made.text or "") + legal(child)
            else:
                last.tail = (last.tail or "") + legal(child)
        else:
            made.append(child)
            last = child
    return made


def page(title: str, style: str, *body: Element) -> bytes:
    """A whole HTML document that refers to nothing outside itself."""
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            element("style", style),
        ),
        element("body", *body),
        lang="en",
    )
    # Not its method "html", which leaves "<" in attributes as it is, so that a drawing would be no XML.
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    return f"<!doctype html>\n{_END_OF_VOID.sub('', text)}\n".encode()


def svg_file(width: float, height: float, style: str, *body: Element) -> bytes:
    """A whole SVG document that refers to nothing outside itself."""
    root = element(
        "svg",
        element("style", style),
        *body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
    )
    return ElementTree.tostring(root, encoding="unicode").encode() + b"\n"


def section(title: str, *children: Element) -> Element:
    """A part of a page, which links find by its title."""
    return element("section", element("h2", title), *children, id=title.lower().replace(" ", "-"))


def note(text: str, kind: str = "note") -> Element:
    """A paragraph."""
    return element("p", text, class_=kind)


def links(sections: Iterable[Element]) -> Element:
    """To each section."""
    found = (element("a", part[0].text or "", href=f"#{part.attrib['id']}") for part in sections)
    return element("nav", *found, aria_label="Sections")


def grid(figures: Iterable[Element]) -> Element:
    """Charts side by side."""
    return element("div", *figures, class_="charts")


def details(title: str, *children: Element) -> Element:
    """Something that is shown when its title is clicked."""
    return element("details", element("summary", title), *children)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, prose: bool = False) -> Element:
    """The first cell of a row names it; the others end at the right, as numbers do, unless they are words."""
    parts = []
    if head:
        cells = [element("th", cell, scope="col") for cell in head]
        parts.append(element("thead", element("tr", *cells)))
    body = [
        element(
            "tr", element("th", str(name), scope="row"), *(element("td", str(v)) for v in values)
        )
        for name, *values in rows
    ]
    made = element("table", *parts, element("tbody", *body), class_="prose" if prose else None)
    return element("div", made, class_="table")


def flatten(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Values of a tree with dotted names; lists of plain values stay whole."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and any(isinstance(value, Mapping | list) for value in tree):
        for number, value in enumerate(tree):
            yield from flatten(value, f"{name}.{number}" if name else str(number))
    else:
        yield name, ", ".join(map(str, tree)) if isinstance(tree, list) else tree


def cell(value: object) -> str:
    """A value for a table, numbers with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def legal(text: str) -> str:
    """Without the characters that no document may hold, such as NUL."""
    return _NOT_IN_XML.sub("\ufffd", text)
