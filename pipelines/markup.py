"""Elements of HTML and of the SVG inside it, tables, and a whole page with its style.

Text and attributes are escaped by the serializer, so nothing that is put into a page can become markup. Called by `charts` and
`report`.
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
        name.rstrip("_").replace("_", "-"): _legal(str(value))
        for name, value in attributes.items()
        if value is not None
    }
    made = Element(tag, found)
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                made.text = (made.text or "") + _legal(child)
            else:
                last.tail = (last.tail or "") + _legal(child)
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


def details(title: str, *children: Element) -> Element:
    """Something that is shown when its title is clicked."""
    return element("details", element("summary", title), *children)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Element:
    """The first cell of a row names it."""
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
    return element("div", element("table", *parts, element("tbody", *body)), class_="table")


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


def _legal(text: str) -> str:
    """Without the characters that no document may hold, such as NUL."""
    return _NOT_IN_XML.sub("\ufffd", text)


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c22; --faint: #66666f; --rule: #e4e4ea; --paper: #fff; --card: #fafafc;
  --accent: #0072b2; --good: #00704f; --bad: #c0341d; LIGHT}
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ee; --faint: #a0a0ac; --rule: #33333c; --paper: #141418;
  --card: #1b1b21; --accent: #6cb8ec; --good: #2fc79b; --bad: #ff7a5c; DARK} }
* { box-sizing: border-box; }
body { max-width: 1320px; margin: 0 auto; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 8px 0 16px; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 19px; }
.state { margin-left: 6px; padding: 2px 10px; border: 1px solid; border-radius: 12px; vertical-align: 4px;
  font-size: 13px; font-weight: 500; white-space: nowrap; color: var(--faint); }
.state.fin { color: var(--good); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px 24px; margin: 0; }
dt { color: var(--faint); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
progress { width: 100%; height: 6px; accent-color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 20px 0; padding: 10px 0;
  border: solid var(--rule); border-width: 1px 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { margin: 0 0 36px; }
.note, footer, figcaption span { color: var(--faint); font-size: 13.5px; }
.note { margin: 0 0 12px; max-width: 85ch; }
.bad { color: var(--bad); overflow-wrap: anywhere; }
.charts, .pictures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
figure { margin: 0; }
.chart { padding: 10px 10px 6px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); }
figcaption { margin-bottom: 6px; overflow-wrap: anywhere; }
.pictures figcaption { color: var(--faint); font-size: 13.5px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--faint); font-weight: 500; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card);
  font: 13px/1.45 ui-monospace, monospace; }
@media print { nav { display: none; } .chart, figure { break-inside: avoid; } }
"""
