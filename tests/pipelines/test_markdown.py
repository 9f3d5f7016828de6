"""Whatever text is put into a Markdown file is text there, for a parser of the real dialect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipelines import markdown

PARSER = MarkdownIt("commonmark").enable("table")
EVIL = [
    "<script>alert('&amp;')</script>",
    "a | b \\| c",
    "![x](http://evil.example/x.png) [y](http://evil.example)",
    "**bold** _it_ `code` ~~gone~~ \\",
    "# not a heading",
    "1. no list",
    "- no list\n\n    no code",
    "a_b __c__ snake_case",
    "---",
    "<http://evil.example> &lt; &#60;",
    "\ud800 \x00",
    "`" * 7,
]
PUNCTUATION = st.text(alphabet="\\`*_[]()<>|&#!~.:-+=$\"'{} \nab1", max_size=30)


def texts(source: str) -> list[str]:
    """The text of every inline element; refuses any that is more than text."""
    found = []
    for token in PARSER.parse(source):
        assert token.type not in ("html_block", "fence", "code_block", "heading_open", "hr")
        assert "list" not in token.type
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special"}, kinds
            found.append("".join(child.content for child in token.children))
    return found


def plain(text: str) -> str:
    """What is left of a text on one line."""
    return " ".join(text.replace("\ud800", "\ufffd").replace("\x00", "\ufffd").split())


@pytest.mark.parametrize("text", EVIL)
def test_hostile_text_stays_text(text) -> None:
    assert texts(markdown.paragraph(text)) == [plain(text)]


@given(text=PUNCTUATION)
def test_any_text_stays_text(text) -> None:
    assert "".join(texts(markdown.paragraph(text))) == plain(text)


@given(cells=st.lists(PUNCTUATION, min_size=4, max_size=4), prose=st.booleans())
def test_a_table_keeps_its_cells(cells, prose) -> None:
    source = markdown.table(("a", "b"), [cells[:2], cells[2:]], prose=prose)
    assert texts(source) == ["a", "b", *map(plain, cells)]
    assert len([token for token in PARSER.parse(source) if token.type == "tr_open"]) == 3


def test_bare_addresses_are_broken() -> None:
    source = markdown.escape("see https://evil.example, www.evil.example or me@evil.example; a: b")
    assert "://" not in source
    assert "www." not in source
    assert "@" not in source
    assert "a: b" in source


def test_headings_pictures_and_code_are_what_they_say() -> None:
    blocks = [
        markdown.heading("a *b*", 2),
        markdown.picture("x.png", "]("),
        markdown.code("a\n# b"),
    ]
    tokens = PARSER.parse("\n\n".join(blocks))
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h2"]
    (image,) = [c for t in tokens for c in t.children or () if c.type == "image"]
    assert image.attrs["src"] == "x.png"
    assert "".join(child.content for child in image.children) == "]("
    assert [token.content for token in tokens if token.type == "code_block"] == ["a\n# b\n"]
