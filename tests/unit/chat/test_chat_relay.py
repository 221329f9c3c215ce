"""The relay against a transport that hands out bytes in any pieces."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_chat.backend import Backend, BackendName, ChatCall
from sage_chat.completions import Completion
from sage_chat.dialect import DialectBackend, Endpoint, Relay
from sage_chat.finetune import FinetuneBackend
from sage_chat.ollama import OllamaBackend
from sage_chat.ollama_dialect import StreamTranslator
from sage_chat.upstream import error_body, read_whole, send
from sage_contracts.errors import ServiceUnavailableError, UpstreamError
from sage_contracts.models import ModelCard
from sage_servicekit.errors import status_of

DONE = b"\n\ndata: [DONE]\n\n"


class Pieces(httpx.AsyncByteStream):
    def __init__(self, pieces: list[bytes], error: Exception | None = None) -> None:
        self._pieces = pieces
        self._error = error
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._error is not None:
            raise self._error

    async def aclose(self) -> None:
        self.is_closed = True


class Silent(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""


class Playback(httpx.AsyncBaseTransport):
    """Answers with the same pieces each time, and breaks off where an error is given."""

    def __init__(self, pieces: list[bytes], content_type: str, error: Exception | None = None) -> None:
        self.stream = Pieces(pieces, error)
        self.headers = {"content-type": content_type}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=self.headers, stream=self.stream)


async def relayed(
    pieces: list[bytes], content_type: str = "text/event-stream", error: Exception | None = None
) -> tuple[list[bytes], bool]:
    transport = Playback(pieces, content_type, error)
    async with httpx.AsyncClient(transport=transport) as client:
        relay = Relay(client, "test", Endpoint("http://server/v1"))
        reply = await relay.post("/chat/completions", ChatCall("m", {"stream": True}).for_upstream())
        async with aclosing(reply):
            return [chunk async for chunk in reply.body], transport.stream.is_closed


@given(st.lists(st.binary(max_size=40), max_size=30))
def test_a_stream_is_relayed_byte_for_byte(pieces: list[bytes]) -> None:
    chunks, is_closed = asyncio.run(relayed([*pieces, DONE], "text/event-stream; charset=utf-8"))
    assert b"".join(chunks) == b"".join([*pieces, DONE])
    assert is_closed


def test_an_event_is_relayed_with_the_bytes_that_complete_it() -> None:
    chunks, _ = asyncio.run(relayed([b"data: {}\n", b"\n: ti", b"ck\n\ndata: 1\n\n", DONE]))
    assert chunks == [b"data: {}\n\n", b": tick\n\ndata: 1\n\n", DONE]


@pytest.mark.parametrize("half", [b'data: {"id":"c1","choices":[{"del', b"data: {", b"da", b"data: {}\r\n"])
def test_the_half_of_an_event_gives_way_to_the_reason_why_it_is_no_whole_one(half: bytes) -> None:
    first = Completion("m").chunk({"content": "Hel"})
    chunks, is_closed = asyncio.run(relayed([first + half[:3], half[3:]], error=httpx.ReadError("gone")))
    assert chunks[0] == first and is_closed
    (told,) = [json.loads(event[6:]) for event in b"".join(chunks[1:]).split(b"\n\n") if event]
    assert "broke off in the middle" in told["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [": tick\n\n"],
        ['data: {"choices":[{"delta":{"content":"Hel"},"finish_reason":null}]}\n\n', "data: {"],
        ['data: {"choices":[{"delta":{"content":"Hel"},"finish_reason":""}]}\n\n'],
        [Completion("m").chunk({"content": '"finish_reason": "stop"\ndata: [DONE]'}).decode()],
    ],
)
def test_a_stream_that_ends_before_its_answer_does_says_so(sent: list[str]) -> None:
    chunks, _ = asyncio.run(relayed([piece.encode() for piece in sent]))
    assert json.loads(chunks[-1].split(b"data: ")[1])["error"]["message"] == (
        "test ended its answer before it was done."
    )


@pytest.mark.parametrize(
    "last",
    [
        'data: {"choices":[{"delta":{},"finish_reason": "stop"}]}\n\ndata: {"choices": [], "usage": {}}\n\n',
        'data: {"choices":[{"text":"","finish_reason":"length"}]}',
        "data:[DONE]\r\n\r\n",
        'data: {"error": {"message": "out of memory"}}\n\n',
        'data: {"error":"out of memory"}\n\n',
    ],
)
def test_a_stream_whose_end_is_told_is_left_alone(last: str) -> None:
    chunks, _ = asyncio.run(relayed([b": tick\n\n", last.encode()]))
    assert b"".join(chunks) == b": tick\n\n" + last.encode()


def test_the_last_event_may_lack_its_empty_line() -> None:
    first = Completion("m").chunk({"content": "Hel"})
    chunks, _ = asyncio.run(relayed([first, b"data: [DONE]"]))
    assert b"".join(chunks) == first + b"data: [DONE]"


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
async def test_what_came_compressed_unasked_is_passed_on_as_it_was_meant(content_type: str) -> None:
    content = Completion("m").chunk({"content": "Hi"}, "stop")
    transport = Playback([gzip.compress(content)], content_type)
    transport.headers["content-encoding"] = "gzip"
    async with httpx.AsyncClient(transport=transport) as client:
        reply = await Relay(client, "test", Endpoint("http://server/v1")).post("/chat/completions", {})
        async with aclosing(reply):
            assert b"".join([chunk async for chunk in reply.body]) == content
    assert "content-encoding" not in reply.headers


def test_a_page_is_no_answer() -> None:
    with pytest.raises(UpstreamError, match=r"address is right\. HTTP 200 from test: <html>Sign in</html>"):
        asyncio.run(relayed([b"<html>Sign in</html>\n"], "text/html"))
    assert asyncio.run(relayed([b'{"choices": []}'], "text/plain"))[0] == [b'{"choices": []}']


@given(st.lists(st.binary(max_size=40), max_size=30))
def test_an_answer_in_one_piece_is_relayed_byte_for_byte(pieces: list[bytes]) -> None:
    chunks, is_closed = asyncio.run(relayed(pieces, "application/json"))
    assert b"".join(chunks) == b"".join(pieces)
    assert is_closed


class Failing(httpx.AsyncBaseTransport):
    """Fails with the given errors in turn, then answers."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors
        self.attempts = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.attempts += 1
        if self.errors:
            raise self.errors.pop(0)
        return httpx.Response(200, content=b"{}")


async def attempt(errors: list[Exception]) -> tuple[httpx.Response | Exception, int]:
    transport = Failing(errors)
    async with httpx.AsyncClient(transport=transport) as client:
        try:
            response = await send(client, client.build_request("POST", "http://server/v1"), "test")
            await response.aclose()
            return response, transport.attempts
        except (ServiceUnavailableError, UpstreamError) as error:
            return error, transport.attempts


async def test_a_refused_connection_is_tried_once_more() -> None:
    outcome, attempts = await attempt([httpx.ConnectError("refused")])
    assert isinstance(outcome, httpx.Response) and attempts == 2


async def test_two_refused_connections_are_enough() -> None:
    outcome, attempts = await attempt([httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")])
    assert isinstance(outcome, ServiceUnavailableError) and attempts == 2


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("gone")])
async def test_a_request_that_may_have_arrived_is_never_sent_twice(error: Exception) -> None:
    outcome, attempts = await attempt([error])
    assert isinstance(outcome, UpstreamError) and attempts == 1


@pytest.mark.parametrize(("method", "is_repeated"), [("POST", False), ("GET", True)])
async def test_only_a_question_that_costs_nothing_is_worth_repeating_after_a_timeout(
    method: str, is_repeated: bool
) -> None:
    async with httpx.AsyncClient(transport=Failing([httpx.ReadTimeout("slow")])) as client:
        with pytest.raises(UpstreamError, match="did not answer in time") as late:
            await send(client, client.build_request(method, "http://server/v1"), "test")
    silent = httpx.Response(200, stream=Silent(), request=httpx.Request(method, "http://server/v1"))
    with pytest.raises(UpstreamError, match="sent nothing") as stopped:
        await read_whole(silent, "test", 0.01)
    for caught in (late, stopped):
        assert caught.value.retryable is is_repeated
        assert status_of(caught.value) == (502 if is_repeated else 504)


BUSY = b'{"error": {"message": "busy", "code": "device_busy"}, "source": "inference"}'


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (404, b'{"error": "no x"}', ("no x", "invalid_request_error", "model_not_found", "s")),
        (
            401,
            b'{"error": {"message": "no", "code": 401}}',
            ("no", "authentication_error", "invalid_api_key", "s"),
        ),
        (503, BUSY, ("busy", "server_error", "device_busy", "inference")),
        (422, b'{"detail": "no field"}', ("no field", "invalid_request_error", "invalid_request", "s")),
        (500, b"", ("HTTP 500 from s: no text", "server_error", "upstream_error", "s")),
        (502, b"\xff<p>", ("HTTP 502 from s: \ufffd<p>", "server_error", "upstream_error", "s")),
        (500, b'["a"]', ('HTTP 500 from s: ["a"]', "server_error", "upstream_error", "s")),
    ],
)
def test_any_error_becomes_openais(status: int, content: bytes, expected: tuple[str, ...]) -> None:
    body = error_body(status, content, "s")
    assert (body.error.message, body.error.type, body.error.code, body.source) == expected


@given(st.binary(max_size=300), st.integers(300, 599))
def test_no_error_text_breaks_the_translation(content: bytes, status: int) -> None:
    body = error_body(status, content, "s")
    assert body.error.message and body.error.code and body.source


ANSWER = [
    {"message": {"role": "assistant", "content": "Grüße, "}, "done": False},
    {"message": {"role": "assistant", "content": "世界"}, "done": False},
    {"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "length", "eval_count": 2},
]
NDJSON = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in ANSWER)


@given(st.lists(st.integers(0, len(NDJSON)), max_size=12))
def test_ollamas_lines_are_understood_in_any_chunking(cuts: list[int]) -> None:
    completion = Completion("m", "chatcmpl-1", 1)
    expected = StreamTranslator(completion, wants_usage=True).feed(NDJSON)
    borders = [0, *sorted(cuts), len(NDJSON)]
    translator = StreamTranslator(completion, wants_usage=True)
    events = [event for start, end in pairwise(borders) for event in translator.feed(NDJSON[start:end])]
    assert events + translator.close() == expected
    assert events[-1] == b"data: [DONE]\n\n" and b'"finish_reason":"length"' in b"".join(events)


async def listed(body: object, make: Callable[[Relay], Backend]) -> list[ModelCard]:
    transport = Playback([json.dumps(body).encode()], "application/json")
    async with httpx.AsyncClient(transport=transport) as client:
        return await make(Relay(client, "test", Endpoint("http://server/v1"))).models()


def tuned_backend(relay: Relay) -> FinetuneBackend:
    return FinetuneBackend(host=relay, registry=relay)


def openai_backend(relay: Relay) -> DialectBackend:
    return DialectBackend(BackendName.OPENAI, relay, "not configured")


def ollama_backend(relay: Relay) -> OllamaBackend:
    return OllamaBackend(relay.client, "http://server")


def test_a_model_of_a_task_that_is_unknown_here_is_listed() -> None:
    """Its plug-in need not be installed where models are only listed and relayed."""
    info = {"name": "mine", "version": 1, "task": "sums", "base_model": "b", "adapter_path": "a"}
    [card] = asyncio.run(
        listed({"data": [{"id": "mine", "created": 1, "owned_by": "sage", "sage": info}]}, tuned_backend)
    )
    assert card.sage is not None and card.sage.task == "sums"


def test_a_tuned_model_that_cannot_be_read_is_the_orchestrators_fault() -> None:
    with pytest.raises(UpstreamError, match=r"(?s)test lists a model .*version"):
        asyncio.run(listed({"data": [{"id": "mine", "created": 1, "sage": {"name": "mine"}}]}, tuned_backend))


@pytest.mark.parametrize("created", [None, "yesterday", [], 1.5, 7])
def test_a_server_may_say_in_its_own_way_when_a_model_was_made(created: object) -> None:
    [card] = asyncio.run(listed({"data": [{"id": "m", "created": created}]}, openai_backend))
    assert (card.id, card.created) == ("m", int(created) if isinstance(created, int | float) else 0)


def test_an_entry_without_a_name_hides_no_other_of_ollama() -> None:
    [card] = asyncio.run(listed({"models": ["x", {}, {"name": "llama3.2:1b"}]}, ollama_backend))
    assert card.id == "llama3.2:1b"
