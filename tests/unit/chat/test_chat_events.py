"""Server-sent events out of bytes in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_chat.events import EventSplitter, data_of

TEXT = st.lists(st.sampled_from([b"data: 1", b": c", b"\n", b"\r\n", b"\n\n", b"x"]), max_size=30).map(
    b"".join
)


@given(TEXT, st.integers(1, 9))
def test_events_are_the_same_in_any_pieces(content: bytes, size: int) -> None:
    content += b"\n\n"
    whole = EventSplitter().feed(content)
    splitter = EventSplitter()
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    assert [event for piece in pieces for event in splitter.feed(piece)] == whole
    assert content.startswith(b"".join(whole))
    assert all(event.endswith((b"\n\n", b"\n\r\n")) for event in whole)


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"event: x\r\ndata:{\r\ndata: }\r\n\r\n", b"{\n}"),
        (b": comment\n\n", None),
        (b"\n\n", None),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


@pytest.mark.parametrize(
    ("rest", "is_whole"),
    [
        (b"data: [DONE]", True),
        (b"data: {}\n", True),
        (b'data: {"a": [', False),
        (b": comm", False),
        (b"", False),
    ],
)
def test_what_only_lacks_its_empty_line_is_an_event(rest: bytes, is_whole: bool) -> None:
    splitter = EventSplitter()
    assert splitter.feed(rest) == []
    assert splitter.close() == ([rest] if is_whole else [])
    assert splitter.close() == []
