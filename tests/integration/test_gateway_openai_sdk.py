"""The official SDK, sync and async, against a running gateway with real programs behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.gateway_stack import KEY, Stack, running

QUESTION: Any = [{"role": "user", "content": "one two three"}]
SAID = "You said: one two three"
MODELS = ["code", "vllm/qwen", "openai/gpt-fake", "ollama/fake-llm:latest", "base:anything"]
BARE = ["qwen", "gpt-fake", "fake-llm", "finetune/code"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("home")) as stack:
        yield stack


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


@pytest.mark.parametrize("model", MODELS + BARE)
def test_sync_chat_in_one_piece(sdk: openai.OpenAI, model: str) -> None:
    answer = sdk.chat.completions.create(model=model, messages=QUESTION)
    assert answer.choices[0].message.content == SAID
    assert answer.choices[0].finish_reason == "stop" and answer.usage is not None


@pytest.mark.parametrize("model", MODELS)
def test_sync_chat_streamed(sdk: openai.OpenAI, model: str) -> None:
    stream = sdk.chat.completions.create(
        model=model,
        messages=QUESTION,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SAID
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5


async def test_many_async_streams_at_once(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0, timeout=60) as sdk:

        async def ask(number: int) -> str:
            said: Any = [{"role": "user", "content": f"number {number}"}]
            stream = await sdk.chat.completions.create(
                model=MODELS[number % len(MODELS)],
                messages=said,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        answers = await asyncio.gather(*(ask(number) for number in range(40)))
    assert answers == [f"You said: number {number}" for number in range(40)]


def test_models_of_all_backends_in_one_list(sdk: openai.OpenAI) -> None:
    listed = [model.id for model in sdk.models.list()]
    assert listed == ["code", "code@1", "vllm/qwen", "openai/gpt-fake", "ollama/fake-llm:latest", "mock"]
    assert sdk.models.retrieve("vllm/qwen").id == "vllm/qwen"


@pytest.mark.parametrize("model", ["cod", "finetune/cod", "vllm/nobody", "openai/nobody", "ollama/nobody"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_model_is_not_found(sdk: openai.OpenAI, model: str, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model=model, messages=QUESTION, stream=stream)
    assert caught.value.code == "model_not_found"
    if "cod" in model:
        assert "Did you mean 'code'?" in caught.value.message and "code@1" in caught.value.message


def test_a_wrong_key_is_an_authentication_error(stack: Stack) -> None:
    with openai.OpenAI(base_url=stack.base_url, api_key="wrong", max_retries=0) as sdk:
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.models.list()
        assert caught.value.code == "invalid_api_key"


def test_upstream_errors_raise_the_sdks_classes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError) as limited:
        sdk.chat.completions.create(model="vllm/rate-limited", messages=QUESTION)
    assert limited.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model="vllm/bad-request", messages=QUESTION)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="vllm/breaks", messages=QUESTION)


@pytest.mark.parametrize("model", ["vllm/breaks", "vllm/breaks-an-event", "vllm/stops", "ollama/breaks"])
def test_a_stream_that_breaks_off_raises_and_does_not_look_complete(sdk: openai.OpenAI, model: str) -> None:
    stream = sdk.chat.completions.create(model=model, messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError):
        list(stream)


@pytest.mark.parametrize("model", ["vllm/silent", "ollama/silent"])
def test_a_client_that_leaves_a_stream_ends_it_upstream(stack: Stack, sdk: openai.OpenAI, model: str) -> None:
    program = stack.ollama if model.startswith("ollama") else stack.vllm
    program.client_left.clear()
    stream = sdk.chat.completions.create(model=model, messages=QUESTION, stream=True)
    assert any(chunk.choices[0].delta.content == "You" for chunk in stream)
    stream.close()
    assert program.client_left.wait(10)


async def test_a_client_that_leaves_before_the_first_byte_ends_it_upstream(stack: Stack) -> None:
    stack.vllm.client_left.clear()
    stack.vllm.arrived.clear()
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        asking = asyncio.create_task(
            client.post(
                f"{stack.base_url}/chat/completions", json={"model": "vllm/silent", "messages": QUESTION}
            )
        )
        assert await asyncio.to_thread(stack.vllm.arrived.wait, 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert await asyncio.to_thread(stack.vllm.client_left.wait, 10)


def test_bytes_of_a_stream_are_those_of_the_upstream(stack: Stack) -> None:
    body = {"messages": QUESTION, "stream": True}
    with serving(stack.vllm.app) as direct:
        expected = httpx.post(f"{direct}/v1/chat/completions", json=body | {"model": "qwen"}).content
    relayed = httpx.post(
        f"{stack.base_url}/chat/completions",
        json=body | {"model": "vllm/qwen"},
        headers={"authorization": f"Bearer {KEY}"},
    )
    assert relayed.content == expected
    assert relayed.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["code", "ollama/fake-llm", "mock"])
def test_an_index_grounds_the_request_and_the_answer_carries_citations(
    stack: Stack, sdk: openai.OpenAI, model: str, stream: bool
) -> None:
    with sdk.chat.completions.with_streaming_response.create(
        model=model,
        messages=[{"role": "user", "content": "What is quantisation?"}],
        stream=stream,
        extra_body={"index": "docs-public"},
    ) as response:
        (citation,) = json.loads(response.headers["x-sage-citations"])
        content = response.read()
    assert citation["source"] == "memory.md#quantisation"
    assert content.startswith(b"data: ") is stream
    if model != "mock":
        received = (stack.ollama if "ollama" in model else stack.host).requests[-1]
        assert "index" not in received
        assert received["messages"][0]["role"] == "system"
        assert "[1] memory.md#quantisation" in received["messages"][0]["content"]


def test_the_clients_key_stays_here_and_its_session_goes_to_our_host(
    stack: Stack, sdk: openai.OpenAI
) -> None:
    session = {"X-Sage-Session": "chat-7"}
    for model, program in (("code", stack.host), ("vllm/qwen", stack.vllm)):
        sdk.chat.completions.create(model=model, messages=QUESTION, extra_headers=session)
        assert "authorization" not in program.headers[-1]
        assert program.headers[-1].get("x-sage-session") == ("chat-7" if model == "code" else None)


@pytest.mark.parametrize("model", ["code", "vllm/qwen", "ollama/fake-llm"])
def test_a_bare_prompt_is_gone_on_from(stack: Stack, sdk: openai.OpenAI, model: str) -> None:
    assert sdk.completions.create(model=model, prompt="def f").choices[0].text == "def f and on"
    stream = sdk.completions.create(
        model=model, prompt="def f", stream=True, extra_headers={"X-Sage-Session": "editor-1"}
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "def f and on"
    if model == "code":
        assert stack.host.headers[-1]["x-sage-session"] == "editor-1"
    several = sdk.completions.create(model=model, prompt=["def f", "def g"]).choices
    assert [(c.index, c.text) for c in several] == [(0, "def f and on"), (1, "def g and on")]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "mock"}, "only chats"),
        ({"model": "code", "extra_body": {"index": "docs-public"}}, "a bare prompt is left alone"),
    ],
)
def test_a_bare_prompt_that_cannot_be_gone_on_from_is_refused(
    sdk: openai.OpenAI, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=told):
        sdk.completions.create(prompt="def f", **fields)


@pytest.mark.parametrize("model", ["vllm/qwen", "ollama/fake-llm"])
def test_embeddings(sdk: openai.OpenAI, model: str) -> None:
    # The SDK asks for base64 by itself and decodes it; a server that answers floats is fine too.
    answer = sdk.embeddings.create(model=model, input=["a"])
    assert answer.data[0].embedding[:2] == [0.5, -1.0]
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        sdk.embeddings.create(model="code", input="a")
