"""Our own engine acts on the fields of a request, or they change nothing, or it refuses them."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from sage_chat.responses_dialect import chat_body
from sage_contracts.errors import InvalidRequestError
from sage_contracts.responses import ResponseRequest
from sage_inference.relay import Call
from sage_inference.transformers_engine.fields import WITHOUT_EFFECT
from sage_inference.transformers_engine.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)


def chat(**fields: Any) -> GenerationRequest:
    said = [{"role": "user", "content": "?"}]
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": said} | fields)
    request.require_supported()
    return request


def completion(**fields: Any) -> GenerationRequest:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "a"} | fields)
    request.require_supported()
    return request


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"web_search_options": {}},
        {"moderation": {"model": "m"}},
        {"reasoning_effort": "low"},
        {"verbosity": "low"},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"n": 2},
        {"logit_bias": {"1": -100}},
        {"response_format": {"type": "json_object"}},
        {"functions": [{"name": "f"}]},
        {"structured_outputs": {"choice": ["zebra"]}},
        {"guided_choice": ["zebra"]},
        {"bad_words": ["Yes"]},
        {"min_tokens": 6},
        {"min_p": 0.1},
        {"ignore_eos": True},
        {"allowed_token_ids": [1]},
        {"prompt_logprobs": 0},
        {"skip_special_tokens": False},
        {"add_generation_prompt": False},
        {"add_special_tokens": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"a_field_of_tomorrow": False},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_a_field_that_it_does_not_act_on_is_refused_by_its_name(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"has no {', '.join(fields)}: leave it out") as caught:
        chat(**fields)
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 0},
        {"logprobs": 1},
        {"echo": True},
        {"best_of": 3},
        {"suffix": "b"},
        {"n": 2},
        {"add_special_tokens": False},
    ],
)
def test_so_is_one_of_plain_completions(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(InvalidRequestError, match=f"has no {name}: leave it out") as caught:
        completion(**fields)
    assert caught.value.param == name


def test_what_does_not_change_the_text_is_taken() -> None:
    chat(
        user="me",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        safety_identifier="me",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        prediction={"type": "content", "content": "maybe"},
        parallel_tool_calls=False,
        tool_choice="auto",
        priority=1,
        request_id="r",
        cache_salt="s",
    )


def test_a_value_that_asks_for_nothing_is_taken() -> None:
    nothing = {"n": 1, "logit_bias": {}, "tools": [], "ignore_eos": False, "min_p": 0, "min_tokens": 0}
    chat(
        **nothing,
        logprobs=False,
        top_logprobs=0,
        response_format={"type": "text"},
        modalities=["text"],
        verbosity="medium",
        functions=[],
        skip_special_tokens=True,
        add_generation_prompt=True,
    )
    completion(**nothing, echo=False, suffix="", best_of=1, bad_words=[], add_special_tokens=True)


def test_what_it_acts_on_is_taken() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "seed": 0}
    sampling |= {"presence_penalty": -2, "frequency_penalty": 2.0}
    ends = {"max_tokens": 3, "stop": "b", "stop_token_ids": [1]}
    streamed = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert chat(**sampling, **ends, **streamed).wants_usage
    assert not completion(**sampling, **ends, stream_options={"include_usage": None}).wants_usage


def test_what_the_host_and_a_response_send_is_taken() -> None:
    asked = ResponseRequest.model_validate(
        {"model": "m", "input": "?", "stream": True, "max_output_tokens": 3, "user": "me", "store": False}
    )
    sent = Call("m", True, chat_body(asked)).for_engine("m@1", [7])
    request = ChatCompletionRequest.model_validate_json(sent)
    request.require_supported()
    assert request.wants_usage and request.stop_token_ids == [7] and request.token_limit == 3


def test_tools_are_refused_unless_none_may_be_called() -> None:
    tools = [{"type": "function"}]
    chat(tools=tools, tool_choice="none")
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": {"type": "function"}}):
        with pytest.raises(
            InvalidRequestError, match=r"has no tools: .*install vLLM and set SAGE_TOOL_CALL_PARSER"
        ) as caught:
            chat(**more, tools=tools)
        assert caught.value.param == "tools"
    with pytest.raises(InvalidRequestError, match=r"has no echo: ") as caught:
        chat(tools=tools, tool_choice="none", echo=True)
    assert "SAGE_TOOL_CALL_PARSER" not in caught.value.message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", ""], ["a", ""]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
        ([], [[]]),
    ],
)
def test_a_prompt_may_be_one_or_many(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_has_64_bits(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        completion(seed=seed)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_is_from_minus_two_to_two(name: str) -> None:
    for penalty in (-2.1, 2.1):
        with pytest.raises(ValidationError, match=name):
            completion(**{name: penalty})


@pytest.mark.parametrize(
    ("ask", "parameters"),
    [
        (chat, chat_params.CompletionCreateParamsNonStreaming),
        (completion, text_params.CompletionCreateParamsNonStreaming),
    ],
)
def test_null_is_as_if_absent_where_openais_types_have_it(ask: Any, parameters: type) -> None:
    hints = get_type_hints(parameters)
    fields = [name for name, kind in hints.items() if NoneType in get_args(kind) and name != "prompt"]
    assert {"stream", "logprobs"} <= set(fields)
    request = ask(**dict.fromkeys(fields), structured_outputs=None, a_field_of_tomorrow=None)
    assert not request.stream


@pytest.mark.parametrize(
    ("page", "heading", "refused"),
    [("serving.md", "Fields of a request", "refused"), ("zh-CN/serving.md", "请求的字段", "拒绝")],
)
def test_the_table_of_fields_is_what_the_engine_does(page: str, heading: str, refused: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    told = {name: row[-1] != refused for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    known = CompletionRequest.model_fields.keys() | WITHOUT_EFFECT
    assert len(told) > 30
    assert [name for name, is_taken in told.items() if is_taken != (name in known)] == []
    assert CompletionRequest.model_fields.keys() - {"model", "prompt"} <= told.keys()
