"""A request to the Responses API becomes one of chat, and what cannot become one is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sage_chat.responses_dialect import chat_body, opened
from sage_contracts.errors import InvalidRequestError
from sage_contracts.responses import ResponseRequest
from sage_servicekit.validation import describe_validation

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Now",
    "parameters": PARAMETERS,
    "strict": True,
}


def translated(**fields: Any) -> dict[str, Any]:
    return chat_body(ResponseRequest.model_validate({"model": "m", "input": "Hello", **fields}))


def items_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message of chat as items of the Responses API."""
    if message["role"] == "tool":
        call_id, output = message["tool_call_id"], message["content"]
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    said = (
        [{"role": message["role"], "content": message["content"]}] if message["content"] is not None else []
    )
    calls = [
        {"type": "function_call", "call_id": call["id"], "id": "fc_1", "status": "completed"}
        | call["function"]
        for call in message.get("tool_calls", [])
    ]
    return [*said, *calls]


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What one question brings: calls with their answers perhaps, and text."""
    text = st.text(max_size=8)
    messages: list[dict[str, Any]] = [{"role": "user", "content": draw(text)}]
    if ids := draw(st.lists(st.uuids().map(str), max_size=3, unique=True)):
        function = {"name": "weather", "arguments": draw(st.sampled_from(["{}", '{"city": "Oslo"}']))}
        calls = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
        messages.append({"role": "assistant", "content": draw(st.none() | text), "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": call_id, "content": draw(text)} for call_id in ids]
    return [*messages, {"role": "assistant", "content": draw(text)}]


@given(st.lists(turns(), min_size=1, max_size=3), st.booleans())
def test_a_conversation_arrives_as_it_was(several: list[list[dict[str, Any]]], is_instructed: bool) -> None:
    conversation = [message for turn in several for message in turn]
    items = [item for message in conversation for item in items_of(message)]
    system = [{"role": "system", "content": "Be brief."}] if is_instructed else []
    sent = translated(input=items, **({"instructions": "Be brief."} if is_instructed else {}))
    assert sent["messages"] == [*system, *conversation]


def test_a_string_is_what_the_user_says() -> None:
    assert translated() == {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def test_instructions_and_a_system_message_are_one_because_many_templates_take_no_second() -> None:
    spoken = [{"role": "developer", "content": "In German."}, {"role": "user", "content": "Hello"}]
    first, second = translated(instructions="Be brief.", input=spoken)["messages"]
    assert first == {"role": "developer", "content": "Be brief.\n\nIn German."} and second == spoken[1]


def test_parts_are_a_string_where_there_is_one_and_chats_parts_where_there_are_several() -> None:
    one, two = {"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}
    earlier = [{"type": "output_text", "text": "said", "annotations": [], "logprobs": []}]
    refused = [{"type": "refusal", "refusal": "No."}]
    sent = translated(
        input=[
            {"type": "message", "role": "user", "content": [one]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": earlier,
            },
            {"role": "assistant", "content": refused},
            {"role": "user", "content": [one, two]},
        ]
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert [message["content"] for message in sent["messages"]] == ["one", "said", "No.", parts]


def test_what_was_said_after_a_call_is_one_message_with_it() -> None:
    called = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
    output = {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": [{"type": "input_text", "text": "7"}],
    }
    first, second = {"role": "assistant", "content": "I look."}, {"role": "assistant", "content": "It is 7."}
    messages = translated(input=[called, first, output, second])["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("assistant", "I look."),
        ("tool", "7"),
        ("assistant", "It is 7."),
    ]


def test_fields_get_chats_names_and_those_of_chat_are_relayed() -> None:
    schema = {"type": "object"}
    wanted = {"type": "json_schema", "name": "person", "schema": schema, "strict": True}
    sent = translated(
        max_output_tokens=9,
        temperature=0,
        top_p=0.5,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": wanted, "verbosity": "low"},
        stream=True,
        index="docs",
        seed=7,
        x_unknown=[1, {"y": None}],
    )
    named = {"name": "person", "schema": schema, "strict": True}
    del sent["messages"], sent["model"]
    assert sent == {
        "max_completion_tokens": 9,
        "temperature": 0,
        "top_p": 0.5,
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {"type": "json_schema", "json_schema": named},
        "stream": True,
        "stream_options": {"include_usage": True},
        "index": "docs",
        "seed": 7,
        "x_unknown": [1, {"y": None}],
    }
    assert translated(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in translated(text={"format": {"type": "text"}})


def test_what_only_the_responses_api_knows_is_not_relayed() -> None:
    sent = translated(
        store=True,
        metadata={"a": "b"},
        include=["reasoning.encrypted_content"],
        truncation="auto",
        max_tool_calls=3,
        stream_options={"include_obfuscation": False},
        previous_response_id=None,
        background=False,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
    )
    assert sent == translated()


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        ("required", "required"),
        ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_tools_are_nested_as_chat_has_them(choice: Any, chosen: Any) -> None:
    sent = translated(tools=[TOOL | {"defer_loading": False}], tool_choice=choice, parallel_tool_calls=False)
    function = {key: TOOL[key] for key in ("name", "description", "parameters", "strict")}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert sent["tool_choice"] == chosen and sent["parallel_tool_calls"] is False


def test_the_response_says_back_what_was_asked() -> None:
    asked = ResponseRequest.model_validate(
        {
            "input": "Hello",
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
            "store": True,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "weather"},
            "text": {"format": {"type": "json_schema", "name": "person", "schema": {}}},
        }
    )
    response = opened(asked)
    assert response["instructions"] == "Be brief." and response["metadata"] == {"a": "b"}
    assert response["store"] is False and response["temperature"] is None
    assert response["tools"] == [TOOL] and response["tool_choice"]["name"] == "weather"
    assert response["text"]["format"] == {"type": "json_schema", "name": "person", "schema": {}}
    assert json.loads(json.dumps(response)) == response


FIELDS = [*ResponseRequest.model_fields, "n", "messages"]
WORDS = st.sampled_from(["message", "function", "function_call", "user", "x"])
NAMES = st.sampled_from(["type", "role", "content", "name", "format", "call_id", "arguments"])
PLAIN = st.none() | st.booleans() | st.integers(-2, 2) | WORDS | st.lists(WORDS, max_size=1)
OBJECTS = st.dictionaries(NAMES, PLAIN | st.dictionaries(NAMES, PLAIN, max_size=2), max_size=4)


@settings(max_examples=400)
@given(st.sampled_from(FIELDS), PLAIN | OBJECTS | st.lists(OBJECTS, max_size=2))
@example("input", [{"type": ["message"]}])
@example("input", [{"role": "user", "content": [{"type": {}}]}])
@example("tools", [{"type": ["function"]}])
def test_whatever_is_sent_is_translated_or_refused(name: str, value: Any) -> None:
    try:
        asked = ResponseRequest.model_validate({"input": "Hello", name: value})
        assert chat_body(asked)["messages"] and opened(asked)["id"]
    except (InvalidRequestError, ValidationError):
        pass


def user_says(part: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("fields", "param", "advice"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "messages and calls as `input`"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "set `stream`"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "as `instructions`"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "Shorten"),
        ({"moderation": {"model": "m"}}, "moderation", "Leave it out"),
        ({"top_logprobs": 2}, "top_logprobs", "/v1/chat/completions"),
        ({"include": ["message.output_text.logprobs"]}, "include", "/v1/chat/completions"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "name an `index`"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools.1.name", "required"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "send only these as `tools`"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
        (user_says({"type": "input_image", "image_url": "x"}), "input.0.content.0", "/v1/chat/completions"),
        (user_says({"type": "input_file", "file_id": "x"}), "input.0.content.0", "only text"),
        (user_says({"type": "input_text"}), "input.0.content.0.text", "required"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "nothing is stored"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input.0", "'web_search_call'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0", "call_id and arguments"),
        ({"input": [{"role": "king", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": ["Hello"]}, "input.0", "an item is an object"),
        ({"input": []}, "input", "at least one message"),
        ({"input": [{"type": "reasoning"}]}, "input", "at least one message"),
        ({"input": None}, "input", "list"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_with_advice(
    fields: dict[str, Any], param: str, advice: str
) -> None:
    with pytest.raises((InvalidRequestError, ValidationError)) as caught:
        translated(**fields)
    raised = caught.value
    error = describe_validation(raised.errors()) if isinstance(raised, ValidationError) else raised
    assert error.param == param and advice in error.message
