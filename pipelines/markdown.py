"""Pieces of a Markdown file, in the dialect of GitHub and CommonMark with tables.

Text is escaped so that it can become no link, picture, HTML or part of a table. Called by `score_report`.
"""

import re
from collections.abc import Iterable, Sequence

from pipelines.markup import legal

_SPECIAL = re.compile(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
_ADDRESS = re.compile(r"(?i)(?<=\w):(?=//)|(?<=\bwww)\.|@")
"""Where bare addresses, which become links by themselves, can be broken."""
_AT_BEGIN = re.compile(r"[#+=-]|\d+[.)]")
"""What makes a line a heading, a list or a rule."""


def escape(text: object) -> str:
    """Text inside a line that is shown as it is."""
    line = " ".join(legal(str(text)).split())
    line = "".join(_ENTITIES.get(letter, letter) for letter in _SPECIAL.sub(r"\\\g<0>", line))
    return _ADDRESS.sub(lambda match: f"&#{ord(match[0])};", line)


def paragraph(text: object) -> str:
    """Text on a line of its own."""
    line = escape(text)
    return f"&#{ord(line[0])};{line[1:]}" if _AT_BEGIN.match(line) else line


def heading(text: str, level: int) -> str:
    """A heading."""
    return f"{'#' * level} {escape(text)}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, prose: bool = False) -> str:
    """A table; its columns but the first end at the right, as numbers do, unless it is of words."""
    rule = ["---", *["---" if prose else "--:"] * (len(head) - 1)]
    lines = [map(escape, head), rule, *(map(escape, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(file: str, told: str) -> str:
    """A picture beside the file."""
    return f"![{escape(told)}]({file})"


def code(text: str) -> str:
    """Lines of code."""
    return "\n".join(f"    {line}" for line in text.splitlines())
