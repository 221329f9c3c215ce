"""The stream of a chat answer."""

from __future__ import annotations

import json

import pytest

from sage_cli.sse import ChatItem, Finished, Piece, Waiting, lines_of, read_chat
from sage_contracts.errors import EngineFailedError, UpstreamError


def chunk(text: str, reason: str = "null") -> str:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}, "finish_reason": {reason}}}]}}'


def read(*events: str) -> list[ChatItem]:
    return list(read_chat("\n\n".join(events).split("\n")))


def test_comments_are_what_is_waited_for_and_text_is_the_answer() -> None:
    events = [
        ": loading weights",
        f": ping\n{chunk('a')}",
        "data: {}",
        chunk("b", '"length"'),
        "data: [DONE]",
    ]
    assert read(*events) == [Waiting("loading weights"), Piece("a"), Piece("b"), Finished("length")]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_what_a_model_thinks_is_waited_for(field: str) -> None:
    def thought(**more: str) -> str:
        return f"data: {json.dumps({'choices': [{'delta': {field: '2+2', **more}}]})}"

    events = [thought(content=""), thought(), chunk("4"), thought(), chunk("!", '"stop"'), "data: [DONE]"]
    # Once there is text, the answer is not interrupted by it.
    waited = [Waiting("thinking"), Waiting("thinking")]
    assert read(*events) == [*waited, Piece("4"), Piece("!"), Finished("stop")]
    assert read(thought(content="a"), "data: [DONE]") == [Piece("a"), Finished(None)]


def test_lines_end_where_the_protocol_says_however_the_bytes_arrive() -> None:
    said = "a\u2028b\u2029c\x85d 字"
    lines = [chunk(said), "\r", chunk("z", '"stop"'), "", "data: [DONE]"]
    stream = "\n".join(lines).encode()
    for size in (1, 7, len(stream)):
        chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert list(read_chat(lines_of(chunks))) == [Piece(said), Piece("z"), Finished("stop")]


def test_an_error_inside_the_stream_is_the_server_s_own() -> None:
    error = 'data: {"error": {"message": "died", "code": "engine_failed"}, "source": "inference"}'
    with pytest.raises(EngineFailedError, match="died"):
        read(chunk("a"), error)


def test_no_error_is_none() -> None:
    last = 'data: {"error": null, "choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}'
    assert read(last) == [Piece("a"), Finished("stop")]


def test_the_data_of_an_event_may_take_several_lines() -> None:
    event = chunk("a", '"stop"').replace(", ", ",\ndata: ")
    assert event.count("data:") > 1
    assert read(event, "data: [DONE]") == [Piece("a"), Finished("stop")]


@pytest.mark.parametrize("events", [[], [chunk("a")], ["data: {"], ["data: 1"]])
def test_a_stream_that_breaks_off_or_is_garbage_is_no_answer(events: list[str]) -> None:
    with pytest.raises(UpstreamError):
        read(*events)
