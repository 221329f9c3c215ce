"""The stream of a chat answer."""

from __future__ import annotations

import json

import pytest

from sage_cli.sse import Finished, Piece, Waiting, lines_of, read_chat
from sage_contracts.errors import EngineFailedError, UpstreamError


def chunk(text: str, reason: str = "null") -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": {reason}}}]}}'


def test_comments_are_what_is_waited_for_and_text_is_the_answer() -> None:
    lines = [
        ": loading weights",
        "",
        ": ping",
        chunk("a"),
        "",
        "data: {}",
        chunk("b", '"length"'),
        "data: [DONE]",
    ]
    assert list(read_chat(lines)) == [Waiting("loading weights"), Piece("a"), Piece("b"), Finished("length")]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_what_a_model_thinks_is_waited_for(field: str) -> None:
    def thought(**more: str) -> str:
        return f"data: {json.dumps({'choices': [{'delta': {field: '2+2', **more}}]})}"

    lines = [thought(content=""), thought(), chunk("4"), thought(), chunk("!", '"stop"'), "data: [DONE]"]
    # Once there is text, the answer is not interrupted by it.
    waited = [Waiting("thinking"), Waiting("thinking")]
    assert list(read_chat(lines)) == [*waited, Piece("4"), Piece("!"), Finished("stop")]
    assert list(read_chat([thought(content="a"), "data: [DONE]"])) == [Piece("a"), Finished(None)]


def test_lines_end_where_the_protocol_says_however_the_bytes_arrive() -> None:
    said = "a\u2028b\u2029c\x85d 字"
    lines = [chunk(said), "\r", chunk("z", '"stop"'), "", "data: [DONE]"]
    stream = "\n".join(lines).encode()
    for size in (1, 7, len(stream)):
        chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert list(read_chat(lines_of(chunks))) == [Piece(said), Piece("z"), Finished("stop")]


def test_an_error_inside_the_stream_is_the_server_s_own() -> None:
    lines = [
        chunk("a"),
        'data: {"error": {"message": "died", "code": "engine_failed"}, "source": "inference"}',
    ]
    with pytest.raises(EngineFailedError, match="died"):
        list(read_chat(lines))


@pytest.mark.parametrize("lines", [[], [chunk("a")], ["data: {"], ["data: 1"]])
def test_a_stream_that_breaks_off_or_is_garbage_is_no_answer(lines: list[str]) -> None:
    with pytest.raises(UpstreamError):
        list(read_chat(lines))
