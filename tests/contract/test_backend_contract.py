"""One body for all five backends, each against a real program of its dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tests.fakes.asgi_server import serving, unused_url
from tests.fakes.fake_ollama import FakeOllama
from tests.fakes.fake_openai import FakeOpenAI

from sage_chat.backend import Backend, BackendName, ChatCall, Reply
from sage_chat.build import Addresses, build_backends
from sage_chat.dialect import Endpoint
from sage_chat.upstream import Deadlines, make_client
from sage_contracts.errors import InvalidRequestError, ServiceUnavailableError, UpstreamError

QUESTION = [{"role": "user", "content": "one two three"}]
REMOTE = [BackendName.OPENAI, BackendName.FINETUNE, BackendName.VLLM, BackendName.OLLAMA]
DEADLINES = Deadlines(connect_s=2, first_byte_s=20, between_bytes_s=20)


@dataclass(frozen=True)
class Servers:
    openai: FakeOpenAI
    openai_url: str
    ollama: FakeOllama
    ollama_url: str

    def program(self, name: BackendName) -> FakeOpenAI | FakeOllama:
        return self.ollama if name is BackendName.OLLAMA else self.openai


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    openai, ollama = FakeOpenAI(), FakeOllama()
    with serving(openai.app) as openai_url, serving(ollama.app) as ollama_url:
        yield Servers(openai, openai_url, ollama, ollama_url)


@pytest.fixture
async def backends(servers: Servers) -> AsyncIterator[dict[BackendName, Backend]]:
    async with make_client() as client:
        yield build_backends(client, addresses(servers.openai_url, servers.ollama_url))


def addresses(openai_url: str, ollama_url: str, deadlines: Deadlines = DEADLINES) -> Addresses:
    return Addresses(
        inference_url=openai_url,
        orchestrator_url=openai_url,
        openai=Endpoint(f"{openai_url}/v1", "sk-test"),
        vllm=Endpoint(openai_url),
        ollama_url=ollama_url,
        deadlines=deadlines,
    )


def model_of(name: BackendName) -> str:
    return {BackendName.MOCK: "mock", BackendName.OLLAMA: "fake-llm:latest"}.get(name, "fake-model")


def call(name: BackendName, model: str | None = None, **more: Any) -> ChatCall:
    body = {"model": f"{name}/ignored", "messages": QUESTION, "index": None, **more}
    return ChatCall(model or model_of(name), body)


async def read(reply: Reply) -> bytes:
    async with aclosing(reply):
        return b"".join([chunk async for chunk in reply.body])


def events_of(content: bytes) -> list[Any]:
    lines = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("name", list(BackendName))
async def test_an_answer_in_one_piece(backends: dict[BackendName, Backend], name: BackendName) -> None:
    reply = await backends[name].stream(call(name))
    answer = json.loads(await read(reply))
    assert reply.status == 200 and not reply.is_stream
    assert answer["object"] == "chat.completion" and answer["model"] == model_of(name)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert "one two three" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    counted = answer["usage"]
    assert counted["total_tokens"] == counted["prompt_tokens"] + counted["completion_tokens"] > 0


@pytest.mark.parametrize("name", list(BackendName))
async def test_a_stream_says_the_same_as_one_piece(
    backends: dict[BackendName, Backend], name: BackendName
) -> None:
    whole = json.loads(await read(await backends[name].stream(call(name))))
    reply = await backends[name].stream(call(name, stream=True))
    assert reply.status == 200 and reply.is_stream
    *chunks, done = events_of(await read(reply))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len([piece for piece in pieces if piece]) > 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and not any(reasons[:-1])


@pytest.mark.parametrize("name", list(BackendName))
async def test_usage_ends_a_stream_that_asked_for_it(
    backends: dict[BackendName, Backend], name: BackendName
) -> None:
    asked = call(name, stream=True, stream_options={"include_usage": True})
    *_, last, done = events_of(await read(await backends[name].stream(asked)))
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("name", list(BackendName))
async def test_models_are_listed_by_the_backends_own_names(
    backends: dict[BackendName, Backend], name: BackendName
) -> None:
    assert [card.id for card in await backends[name].models()] == [model_of(name)]


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("limit_field", ["max_tokens", "max_completion_tokens"])
async def test_the_length_limit_arrives(
    backends: dict[BackendName, Backend], name: BackendName, limit_field: str
) -> None:
    answer = json.loads(await read(await backends[name].stream(call(name, None, **{limit_field: 2}))))
    assert answer["choices"][0]["message"]["content"] == "You said:"
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_model_is_an_error_in_openais_shape(
    backends: dict[BackendName, Backend], name: BackendName, stream: bool
) -> None:
    reply = await backends[name].stream(call(name, "nobody", stream=stream))
    body = json.loads(await read(reply))
    assert reply.status == 404 and reply.headers["content-type"] == "application/json"
    assert "nobody" in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["code"] == "model_not_found"
    assert body["source"] == ("inference" if name is BackendName.FINETUNE else name)


@pytest.mark.parametrize("name", REMOTE)
async def test_closing_an_answer_half_way_ends_it_upstream(
    backends: dict[BackendName, Backend], servers: Servers, name: BackendName
) -> None:
    program = servers.program(name)
    program.client_left.clear()
    reply = await backends[name].stream(call(name, "silent", stream=True))
    async with aclosing(reply):
        async for chunk in reply.body:
            if b"You" in chunk:
                break
    assert program.client_left.wait(10)


@pytest.mark.parametrize("name", REMOTE)
async def test_a_reply_that_nobody_read_lets_go_of_the_upstream(
    backends: dict[BackendName, Backend], servers: Servers, name: BackendName
) -> None:
    program = servers.program(name)
    program.client_left.clear()
    reply = await backends[name].stream(call(name, "silent", stream=True))
    await reply.aclose()
    assert program.client_left.wait(10)


@pytest.mark.parametrize("name", REMOTE)
async def test_an_upstream_that_breaks_off_is_an_error_inside_the_stream(
    backends: dict[BackendName, Backend], name: BackendName
) -> None:
    events = events_of(await read(await backends[name].stream(call(name, "breaks", stream=True))))
    assert "[DONE]" not in events
    assert events[-1]["error"]["message"] and events[-1]["source"]
    assert events[0]["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("name", REMOTE)
async def test_silence_in_the_middle_is_an_error_after_the_deadline(
    servers: Servers, name: BackendName
) -> None:
    short = Deadlines(connect_s=2, first_byte_s=20, between_bytes_s=0.3)
    async with make_client() as client:
        backend = build_backends(client, addresses(servers.openai_url, servers.ollama_url, short))[name]
        events = events_of(await read(await backend.stream(call(name, "silent", stream=True))))
    assert "sent nothing for 0.3 s" in events[-1]["error"]["message"]


async def test_comments_count_as_signs_of_life(servers: Servers) -> None:
    # 0.4 s of comments every 0.05 s, under a deadline that the silence alone would break.
    short = Deadlines(connect_s=2, first_byte_s=20, between_bytes_s=0.3)
    async with make_client() as client:
        backends = build_backends(client, addresses(servers.openai_url, servers.ollama_url, short))
        backend = backends[BackendName.FINETUNE]
        content = await read(await backend.stream(call(BackendName.FINETUNE, "patient", stream=True)))
    assert b": starting 7\n\n" in content and content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("name", REMOTE)
async def test_nobody_there_is_a_service_that_is_unavailable(name: BackendName) -> None:
    nowhere = unused_url()
    async with make_client() as client:
        backend = build_backends(client, addresses(nowhere, nowhere))[name]
        with pytest.raises(ServiceUnavailableError, match="cannot be reached") as caught:
            await backend.stream(call(name))
        with pytest.raises(ServiceUnavailableError):
            await backend.models()
    assert caught.value.source == ("inference" if name is BackendName.FINETUNE else name)
    assert caught.value.retry_after_s is not None


async def test_half_a_json_is_an_upstream_error(backends: dict[BackendName, Backend]) -> None:
    with pytest.raises(UpstreamError, match="broke off"):
        await backends[BackendName.VLLM].stream(call(BackendName.VLLM, "breaks"))


@pytest.mark.parametrize(
    ("model", "status", "code", "says"),
    [
        ("bad-request", 400, "invalid_value", "temperature"),
        ("rate-limited", 429, "rate_limit_exceeded", "Slow down"),
        ("old-vllm-error", 400, "invalid_request", "too many tokens"),
        ("html-error", 502, "upstream_error", "<h1>Bad gateway</h1>"),
    ],
)
async def test_errors_of_every_shape_leave_in_openais(
    backends: dict[BackendName, Backend], model: str, status: int, code: str, says: str
) -> None:
    reply = await backends[BackendName.OPENAI].stream(call(BackendName.OPENAI, model, stream=True))
    body = json.loads(await read(reply))
    assert (reply.status, body["error"]["code"], body["source"]) == (status, code, "openai")
    assert says in body["error"]["message"]
    assert reply.headers.get("retry-after") == ("7" if status == 429 else None)
    assert reply.headers.get("x-should-retry") == ("true" if status == 429 else None)


async def test_ollamas_engine_errors_are_translated(backends: dict[BackendName, Backend]) -> None:
    reply = await backends[BackendName.OLLAMA].stream(call(BackendName.OLLAMA, "fails"))
    body = json.loads(await read(reply))
    assert reply.status == 500 and body["error"]["type"] == "server_error"
    assert "runner process has terminated" in body["error"]["message"]


async def test_the_request_is_relayed_untouched_but_for_model_and_index(
    backends: dict[BackendName, Backend], servers: Servers
) -> None:
    sent = {"temperature": 0.1, "logit_bias": {"50256": -100}, "x_unknown": [1, {"y": None}], "n": 1}
    await read(await backends[BackendName.OPENAI].stream(call(BackendName.OPENAI, None, **sent)))
    assert servers.openai.requests[-1] == {"model": "fake-model", "messages": QUESTION, **sent}
    assert servers.openai.headers[-1]["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize("name", REMOTE)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bare_prompt_is_gone_on_from(
    backends: dict[BackendName, Backend], name: BackendName, stream: bool
) -> None:
    asked = ChatCall(model_of(name), {"prompt": "def f", "stream": stream})
    content = await read(await backends[name].complete(asked))
    if not stream:
        (choice,) = json.loads(content)["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("def f and on", "stop")
        return
    events = events_of(content)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "def f and on"


async def test_the_mock_goes_on_from_no_prompt(backends: dict[BackendName, Backend]) -> None:
    with pytest.raises(InvalidRequestError, match="only chats"):
        await backends[BackendName.MOCK].complete(ChatCall("mock", {"prompt": "a"}))


@pytest.mark.parametrize("name", [BackendName.OPENAI, BackendName.VLLM, BackendName.OLLAMA])
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_embeddings(backends: dict[BackendName, Backend], name: BackendName, encoding: str) -> None:
    asked = ChatCall(model_of(name), {"input": ["a"], "encoding_format": encoding})
    answer = json.loads(await read(await backends[name].embed(asked)))
    assert answer["object"] == "list" and answer["usage"]["prompt_tokens"] == 1
    if name is BackendName.OLLAMA and encoding == "base64":
        assert answer["data"][0]["embedding"] == "AAAAPwAAgL8AAAAA"
    else:
        assert answer["data"][0]["embedding"][:2] == [0.5, -1.0]


@pytest.mark.parametrize("name", [BackendName.MOCK, BackendName.FINETUNE])
async def test_backends_without_embeddings_say_so(
    backends: dict[BackendName, Backend], name: BackendName
) -> None:
    with pytest.raises(InvalidRequestError, match="no embeddings"):
        await backends[name].embed(call(name))


async def test_unconfigured_backends_say_what_to_set() -> None:
    async with httpx.AsyncClient() as client:
        backends = build_backends(client, Addresses(unused_url(), unused_url()))
        with pytest.raises(InvalidRequestError, match="OPENAI_API_KEY"):
            await backends[BackendName.OPENAI].stream(call(BackendName.OPENAI))
        with pytest.raises(InvalidRequestError, match="SAGE_VLLM_BASE_URL"):
            await backends[BackendName.VLLM].stream(call(BackendName.VLLM))
        assert await backends[BackendName.OPENAI].models() == []
