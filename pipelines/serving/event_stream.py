"""Reads a stream of server-sent events.

The format is that of the WHATWG, HTML Living Standard, section 9.2, "Server-sent events",
https://html.spec.whatwg.org/multipage/server-sent-events.html, without what only a browser does: to connect anew and to say
which event came last. Called by `client`.
"""

import re
from collections.abc import Iterable, Iterator


def server_sent_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Names and data of the events in a stream, wherever its chunks are cut; what is cut off at its end is none."""
    name, data = "", list[str]()
    for line in _lines(chunks):
        if not line:
            if data:
                yield name or "message", "\n".join(data)
            name, data = "", []
        field, _, value = line.partition(":")  # a comment has an empty field
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines, ended by CR LF, LF or CR; in UTF-8 neither byte is ever part of another character.

    `str.splitlines` would not do: it ends lines at characters that are data here.
    """
    parts, after_cr, first = list[bytes](), False, True
    for chunk in chunks:
        if not chunk:
            continue
        rest = chunk[1:] if after_cr and chunk.startswith(b"\n") else chunk
        after_cr = rest.endswith(b"\r")
        begun, *more = re.split(rb"\r\n|\n|\r", rest)
        parts.append(begun)
        for piece in more:
            line = b"".join(parts).decode("utf-8", "replace")
            yield line.removeprefix("\ufeff") if first else line
            parts, first = [piece], False
