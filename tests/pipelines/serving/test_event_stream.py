"""Server-sent events: whatever the ends of lines and wherever the stream is cut, the same events."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.serving.event_stream import server_sent_events

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))
NAME = st.from_regex(r"[a-z_.]{1,12}", fullmatch=True)
EVENT = st.tuples(NAME, st.lists(LINE, min_size=1, max_size=3))


@given(
    events=st.lists(EVENT, max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    between=st.sampled_from(["", ": a comment", ":", "retry: 10", "id: 7", "unheard of"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_events_arrive_as_they_were_sent(events, end, between, cuts) -> None:
    lines = []
    for name, data in events:
        lines += [between] if between else []
        lines += [f"event: {name}", *(f"data: {line}" for line in data), ""]
    stream = "".join(line + end for line in lines).encode()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    chunks = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    assert list(server_sent_events(chunks)) == [(name, "\n".join(data)) for name, data in events]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: x\n\n", [("message", "x")]),
        (b"data:x\n\n", [("message", "x")]),
        (b"data:  x\n\n", [("message", " x")]),
        (b"data\n\n", [("message", "")]),
        (b"event: a\n\nevent: b\ndata: x\n\n", [("b", "x")]),
        (b"\xef\xbb\xbfdata: x\n\n", [("message", "x")]),
        (b"data: x\n\ndata: cut off", [("message", "x")]),
        (b"data: x\n\ndata: cut off\n", [("message", "x")]),
        (b": alone\n\n: alone\n\n", []),
        (b"data: \xff\n\n", [("message", "\ufffd")]),
        (b"", []),
    ],
)
def test_what_the_standard_says_about_rare_forms(stream, events) -> None:
    assert list(server_sent_events([stream])) == events
    assert list(server_sent_events([bytes([byte]) for byte in stream])) == events


def test_an_event_is_there_as_soon_as_its_line_has_ended() -> None:
    chunks = iter([b"data: x\r\r", b"\ndata: y\r\n\r", b"\n"])
    events = server_sent_events(chunks)
    assert next(events) == ("message", "x")
    assert next(events) == ("message", "y")
    assert next(chunks) == b"\n"
