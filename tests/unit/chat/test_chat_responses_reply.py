"""A backend's reply on its way to the client of the Responses API: at once, to its end, and let go of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

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


async def test_a_refusal_stays_as_it_is() -> None:
    refusal = whole_reply(429, b'{"error": {"message": "Slow down."}}', HEADERS)
    assert await response_reply(refusal, ASKED) is refusal


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 1}]}']
)
async def test_an_answer_that_is_none_is_an_error(content: bytes) -> None:
    with pytest.raises(UpstreamError, match="no chat completion"):
        await response_reply(whole_reply(200, content), ASKED)
