"""A backend's reply on its way to the client of the Responses API: at once, to its end, and let go of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from sage_chat.backend import Reply, whole_reply
from sage_chat.completions import STREAM_HEADERS, Completion
from sage_chat.responses import response_reply
from sage_contracts.errors import UpstreamError
from sage_contracts.responses import ResponseRequest

ASKED = ResponseRequest.model_validate({"input": "Hello", "model": "m"})
HEADERS = {"content-type": "application/json", "retry-after": "7"}


class Upstream:
    """A stream that says one word, and then ends or is silent for ever."""

    def __init__(self, *, is_silent: bool = False) -> None:
        self.is_silent = is_silent
        self.is_closed = False

    def reply(self) -> Reply:
        return Reply(200, self._events(), dict(STREAM_HEADERS), self.close)

    async def close(self) -> None:
        self.is_closed = True

    async def _events(self) -> AsyncGenerator[bytes, None]:
        yield Completion("m").chunk({"content": "word"})
        if self.is_silent:
            await asyncio.Event().wait()


async def test_a_word_is_told_before_the_next_one_is_there() -> None:
    upstream = Upstream(is_silent=True)
    reply = await response_reply(upstream.reply(), ASKED)
    async with asyncio.timeout(5):
        async for event in reply.body:
            if event.startswith(b"event: response.output_text.delta\n"):
                break
    await reply.aclose()
    assert upstream.is_closed


async def test_a_reply_that_nobody_read_lets_go_of_the_upstream() -> None:
    upstream = Upstream()
    await (await response_reply(upstream.reply(), ASKED)).aclose()
    assert upstream.is_closed


async def test_a_stream_that_ends_too_early_is_told_as_failed() -> None:
    reply = await response_reply(Upstream().reply(), ASKED)
    assert reply.is_stream
    *_, last = [event async for event in reply.body]
    assert last.startswith(b"event: response.failed\n") and b"before the model did" in last


async def test_an_answer_in_one_piece_keeps_its_headers_but_for_the_length() -> None:
    chat = Completion("served").whole({"role": "assistant", "content": "word"}, "stop", {})
    reply = await response_reply(whole_reply(200, chat, {"x-sage-engine": "vllm"}), ASKED)
    content = b"".join([chunk async for chunk in reply.body])
    assert json.loads(content)["output"][0]["content"][0]["text"] == "word"
    assert reply.headers["content-length"] == str(len(content)) and reply.headers["x-sage-engine"] == "vllm"


def refusal(message: str, param: str | None = None) -> Reply:
    detail = {"message": message, "type": "t", "param": param, "code": "c"}
    return whole_reply(400, json.dumps({"error": detail, "source": "vllm"}).encode(), HEADERS)


async def told(reply: Reply, **asked: Any) -> dict[str, Any]:
    request = ResponseRequest.model_validate({"input": "Hello", "model": "m", **asked})
    answer = await response_reply(reply, request)
    assert answer.status == reply.status and answer.headers["retry-after"] == "7"
    body: dict[str, Any] = json.loads(b"".join([chunk async for chunk in answer.body]))
    assert (body["source"], body["error"]["type"], body["error"]["code"]) == ("vllm", "t", "c")
    return body["error"]


@pytest.mark.parametrize(
    ("param", "message", "here", "said"),
    [
        ("max_completion_tokens", "max_completion_tokens: 0", "max_output_tokens", "max_output_tokens: 0"),
        ("max_tokens", "Lower max_tokens.", "max_output_tokens", "Lower max_output_tokens."),
        ("response_format", "It has no response_format.", "text.format", "It has no text.format."),
        ("reasoning_effort", "reasoning_effort", "reasoning.effort", "reasoning.effort"),
        ("messages.1.content", "The messages are too long.", "input", "The messages are too long."),
        ("messages[0]", "Empty.", "input", "Empty."),
        ("temperature", "Too hot.", "temperature", "Too hot."),
        (None, "No max_tokens_per_day left.", None, "No max_tokens_per_day left."),
    ],
)
async def test_a_refusal_blames_what_the_client_sent(
    param: str | None, message: str, here: str | None, said: str
) -> None:
    error = await told(refusal(message, param))
    assert (error["param"], error["message"]) == (here, said)


async def test_what_was_sent_by_chats_name_is_blamed_by_it() -> None:
    error = await told(refusal("Lower max_tokens.", "max_tokens"), max_tokens=9000)
    assert (error["param"], error["message"]) == ("max_tokens", "Lower max_tokens.")


async def test_a_refusal_that_cannot_be_read_stays_as_it_is() -> None:
    answer = await response_reply(whole_reply(429, b"Slow down.", HEADERS), ASKED)
    assert answer.status == 429 and answer.headers["retry-after"] == "7"
    assert b"".join([chunk async for chunk in answer.body]) == b"Slow down."


async def test_a_refused_stream_is_let_go_of() -> None:
    upstream = Upstream()
    reply = upstream.reply()
    reply.status = 503
    assert not (await response_reply(reply, ASKED)).is_stream and upstream.is_closed


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 1}]}']
)
async def test_an_answer_that_is_none_is_an_error(content: bytes) -> None:
    with pytest.raises(UpstreamError, match="no chat completion"):
        await response_reply(whole_reply(200, content), ASKED)
