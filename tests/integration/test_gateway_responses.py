"""The official SDK's `client.responses` against a running gateway, with each backend's dialect behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.fakes import inference_rig
from tests.fakes.asgi_server import serving
from tests.fakes.gateway_stack import KEY, Stack, running
from tests.fakes.model_registry import Registry

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

DOCS = Path(__file__).parents[2] / "docs"
MODELS = ["mock", "code", "vllm/qwen", "openai/gpt-fake", "ollama/fake-llm:latest"]
REMOTE = MODELS[1:]
SAID = "You said: one two three"
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


class City(BaseModel):
    name: str


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("home")) as stack:
        yield stack


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def received(stack: Stack, model: str) -> dict[str, Any]:
    """The last request that came to the program behind this model."""
    if model.startswith("ollama/"):
        return stack.ollama.requests[-1]
    return {"code": stack.host, "vllm/qwen": stack.vllm, "openai/gpt-fake": stack.cloud}[model].requests[-1]


@pytest.mark.parametrize("model", MODELS)
def test_a_response_in_one_piece(sdk: openai.OpenAI, model: str) -> None:
    response = sdk.responses.create(model=model, input="one two three", metadata={"team": "blue"})
    assert response.output_text.endswith(SAID)
    assert (response.status, response.error, response.metadata) == ("completed", None, {"team": "blue"})
    assert response.usage is not None and response.usage.total_tokens > response.usage.output_tokens > 0


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_of_events(sdk: openai.OpenAI, model: str) -> None:
    events = list(sdk.responses.create(model=model, input="one two three", stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.completed" and last.response.usage is not None
    assert last.response.output_text == "".join(deltas) and last.response.output_text.endswith(SAID)
    assert len(deltas) > 1 and [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("model", MODELS)
def test_the_helper_for_streams(sdk: openai.OpenAI, model: str) -> None:
    with sdk.responses.stream(model=model, input="one two three") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_text == snapshots[-1] and final.output_text.endswith(SAID)
    assert final.model in model


async def test_the_async_client(stack: Stack) -> None:
    sdk = openai.AsyncOpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0, timeout=20)
    async with sdk, sdk.responses.stream(model="code", input="one two three") as stream:
        assert (await stream.get_final_response()).output_text == SAID


def test_the_thoughts_of_a_model_are_an_item_that_is_not_sent_back(stack: Stack, sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="ollama/thinker", input="one") as stream:
        thought = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
        final = stream.get_final_response()
    assert thought == ["Hmm."] and final.output_text == "You said: one"
    said: Any = [{"role": "user", "content": "one"}, *final.output, {"role": "user", "content": "two"}]
    assert sdk.responses.create(model="ollama/thinker", input=said).output_text == "You said: two"
    roles = [message["role"] for message in stack.ollama.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_a_conversation_without_a_store_goes_on_by_sending_it_back(stack: Stack, sdk: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": [{"type": "input_text", "text": "one two three"}]}]
    first = sdk.responses.create(model="code", instructions="Be brief.", input=said)
    said += [*first.output, {"role": "user", "content": "four"}]
    second = sdk.responses.create(model="code", instructions="Be brief.", input=said)
    assert second.output_text == "You said: four"
    assert received(stack, "code")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": "four"},
    ]


def run_example(page: Path, sdk: openai.OpenAI, model: str) -> None:
    """The block of a page that asks for responses, with another model in it."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    example = next(block for block in blocks if "client.responses.create(" in block)
    exec(example.replace('"support"', f'"{model}"'), {"client": sdk})


@pytest.mark.parametrize("folder", [DOCS, DOCS / "zh-CN"], ids=lambda folder: folder.name)
def test_the_first_example_asks_for_nothing_that_an_engine_may_lack(
    stack: Stack, sdk: openai.OpenAI, folder: Path
) -> None:
    run_example(folder / "api.md", sdk, "code")
    asked = received(stack, "code")
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"]
    assert "tools" not in asked


@pytest.mark.parametrize("folder", [DOCS, DOCS / "zh-CN"], ids=lambda folder: folder.name)
def test_the_example_with_tools_sends_what_they_gave(stack: Stack, sdk: openai.OpenAI, folder: Path) -> None:
    run_example(folder / "serving.md", sdk, "code")
    roles = [message["role"] for message in received(stack, "code")["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", REMOTE)
def test_a_function_is_called_and_its_output_answered(
    stack: Stack, sdk: openai.OpenAI, model: str, stream: bool
) -> None:
    said: Any = [{"role": "user", "content": "How is the weather?"}]
    asked: dict[str, Any] = {"model": model, "input": said, "tools": [TOOL]}
    if stream:
        with sdk.responses.stream(**asked) as events:
            response: Any = events.get_final_response()
    else:
        response = sdk.responses.create(**asked)
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls == response.output and {call.name for call in calls} == {"weather"}
    cities = [json.loads(call.arguments)["city"] for call in calls]
    assert cities == (["Wuhan"] if "ollama" in model else ["Wuhan", "Oslo"])
    assert received(stack, model)["tools"][0]["function"]["name"] == "weather"

    said += response.output
    said += [
        {"type": "function_call_output", "call_id": call.call_id, "output": "31 degrees"} for call in calls
    ]
    assert sdk.responses.create(model=model, input=said).output_text == "You said: 31 degrees"
    roles = [message["role"] for message in received(stack, model)["messages"]]
    assert roles == ["user", "assistant", *["tool" for _ in calls]]


def test_arguments_of_calls_come_as_deltas(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="vllm/qwen", input="Weather?", tools=[TOOL]) as stream:
        grown = [
            (event.output_index, event.snapshot)
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
    assert grown[1::2] == [(0, '{"city": "Wuhan"}'), (1, '{"city": "Oslo"}')]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", REMOTE)
def test_a_length_limit_makes_it_incomplete(sdk: openai.OpenAI, model: str, stream: bool) -> None:
    asked: Any = {"model": model, "input": "one two three", "max_output_tokens": 2}
    response = sdk.responses.create(**asked)
    if stream:
        last = list(sdk.responses.create(**asked, stream=True))[-1]
        assert last.type == "response.incomplete"
        response = last.response
    assert (response.output_text, response.status) == ("You said:", "incomplete")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_a_format_arrives_as_chats_response_format(stack: Stack, sdk: openai.OpenAI) -> None:
    with pytest.raises(ValueError, match="City"):  # the fake says no JSON
        sdk.responses.parse(model="vllm/qwen", input="Oslo?", text_format=City)
    wanted = received(stack, "vllm/qwen")["response_format"]
    assert wanted["type"] == "json_schema" and wanted["json_schema"]["name"] == "City"
    assert wanted["json_schema"]["schema"]["required"] == ["name"]


@pytest.mark.parametrize("model", ["vllm/breaks", "ollama/breaks"])
def test_a_stream_that_breaks_off_is_a_failed_response(sdk: openai.OpenAI, model: str) -> None:
    last = list(sdk.responses.create(model=model, input="one two three", stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None and last.response.error.message
    assert last.response.output_text == "You said:"


@pytest.mark.parametrize("model", ["vllm/silent", "ollama/silent"])
def test_words_come_at_once_and_leaving_ends_it_upstream(
    stack: Stack, sdk: openai.OpenAI, model: str
) -> None:
    program = stack.ollama if model.startswith("ollama") else stack.vllm
    program.client_left.clear()
    stream = sdk.responses.create(model=model, input="one two three", stream=True)
    # After this word the fake is silent for a minute.
    assert any(event.type == "response.output_text.delta" and event.delta == "You" for event in stream)
    stream.close()
    assert program.client_left.wait(10)


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_those_of_chat(sdk: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'code'") as unknown:
        sdk.responses.create(model="cod", input="x", stream=stream)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.RateLimitError) as limited:
        sdk.responses.create(model="vllm/rate-limited", input="x", stream=stream)
    assert limited.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.responses.create(model="code", input="x", previous_response_id="resp_1", stream=stream)
    assert refused.value.param == "previous_response_id" and refused.value.code == "invalid_request"


def test_what_a_dialect_refuses_is_blamed_on_what_was_sent(sdk: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "no JSON"}
    with pytest.raises(openai.BadRequestError, match="no JSON") as refused:
        sdk.responses.create(model="ollama/fake-llm", input=[call])  # type: ignore[list-item]
    assert refused.value.param == "input"


def test_an_answer_that_is_none_is_an_error(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError):
        sdk.responses.create(model="vllm/breaks", input="x")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["mock", "code", "ollama/fake-llm"])
def test_an_index_grounds_the_request_and_the_answer_carries_citations(
    sdk: openai.OpenAI, model: str, stream: bool
) -> None:
    with sdk.responses.with_streaming_response.create(
        model=model, input="What is quantisation?", stream=stream, extra_body={"index": "docs-public"}
    ) as response:
        (citation,) = json.loads(response.headers["x-sage-citations"])
        content = response.read()
    assert citation["source"] == "memory.md#quantisation"
    assert response.headers["x-sage-backend"] == {"code": "finetune", "mock": "mock"}.get(model, "ollama")
    assert content.startswith(b"event: response.created\n") is stream


def test_nothing_is_stored(stack: Stack, sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(model="mock", input="x", store=True)
    assert response.to_dict()["store"] is False
    for ask in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not stored here"):
            ask(response.id)
    with pytest.raises(openai.NotFoundError, match="not stored here"):
        sdk.responses.input_items.list(response.id)
    for path in ("input_tokens", "compact"):  # which are no responses
        with pytest.raises(openai.NotFoundError, match=f"There is no POST /v1/responses/{path} here"):
            sdk.post(f"/responses/{path}", body={"model": "mock", "input": "x"}, cast_to=object)


def test_a_wrong_key_is_refused(stack: Stack) -> None:
    stranger = openai.OpenAI(base_url=stack.base_url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.responses.create(model="mock", input="x")


def test_a_cold_engine_of_our_own_answers(tmp_path: Path) -> None:
    from tests.fakes.tiny_llama import make_adapter, make_model

    registry = Registry()
    base = make_model(tmp_path / "base_models/tiny")
    make_adapter(tmp_path / "adapters/1", base)
    registry.add("code@1", "base_models/tiny", Path("adapters/1"))
    engine: Any = {"engine": "transformers", "vllm_command": "", "engine_threads": 1}
    with inference_rig.running(tmp_path, registry=registry, comment_interval_s=0.2, **engine) as rig:
        host_url = str(rig.http.base_url)
        settings = GatewaySettings(home_dir=tmp_path, inference_url=host_url, orchestrator_url=host_url)
        with serving(build_app(settings)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as sdk:
            asked: Any = {"model": "code@1", "input": "Hi", "max_output_tokens": 12, "temperature": 0}
            events = list(sdk.responses.create(**asked, stream=True))
            whole = sdk.responses.create(**asked)
            with pytest.raises(openai.BadRequestError, match="tools"):
                sdk.responses.create(**asked, tools=[TOOL])
            with pytest.raises(openai.BadRequestError) as refused:
                sdk.responses.create(**asked | {"max_output_tokens": 0})
        chatted = rig.ask("code@1", max_tokens=12, messages=[{"role": "user", "content": "Hi"}]).json()
    assert refused.value.param == "max_output_tokens" and "completion" not in refused.value.message
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert whole.output_text == chatted["choices"][0]["message"]["content"] != ""
    assert whole.usage is not None and whole.usage.output_tokens == 12 and last.response.usage == whole.usage
