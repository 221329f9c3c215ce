from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs

from sage_chat.backend import ChatCall
from sage_chat.completions import DONE, Completion
from sage_chat.ollama_dialect import StreamTranslator, chat_request, completion_from, embed_request
from sage_contracts.errors import InvalidRequestError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def translated(**body: Any) -> dict[str, Any]:
    return chat_request(ChatCall("qwen3", {"messages": [{"role": "user", "content": "hi"}], **body}))


def test_sampling_options_get_ollamas_names() -> None:
    request = translated(
        temperature=0, top_p=0.9, seed=7, max_tokens=5, frequency_penalty=0.5, stop="END", user="me"
    )
    options = {"temperature": 0, "top_p": 0.9, "seed": 7, "num_predict": 5, "frequency_penalty": 0.5}
    assert request["options"] == {**options, "stop": ["END"]}
    assert request["stream"] is False and "user" not in request


def test_stream_is_always_said_because_ollama_streams_by_default() -> None:
    assert translated()["stream"] is False
    assert translated(stream=True)["stream"] is True
    assert "options" not in translated()


def test_structured_outputs() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    assert translated(response_format=wrapped)["format"] == schema
    assert translated(response_format={"type": "json_object"})["format"] == "json"
    assert translated(response_format=wrapped | {"strict": True})["format"] == schema
    for nothing in (None, {"type": "text"}):
        assert "format" not in translated(response_format=nothing)


@pytest.mark.parametrize(("effort", "think"), [("high", "high"), ("none", False)])
def test_reasoning_effort(effort: str, think: Any) -> None:
    assert translated(reasoning_effort=effort)["think"] == think


def test_messages_with_parts_images_and_tools() -> None:
    called = {
        "id": "call_9",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Wuhan"}'},
    }
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
    ]
    request = translated(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "call_9", "content": "31 °C"},
        ],
        tools=[TOOL],
    )
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is this?", "images": ["aGk="]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Wuhan"}}}],
        },
        {"role": "tool", "content": "31 °C", "tool_name": "weather"},
    ]
    assert request["tools"] == [TOOL]


def test_ollamas_own_options_are_passed_on_and_win() -> None:
    request = translated(temperature=0, top_p=0.9, options={"num_ctx": 8192, "temperature": 0.5})
    assert request["options"] == {"temperature": 0.5, "top_p": 0.9, "num_ctx": 8192}
    assert translated(options={"num_ctx": 8192})["options"] == {"num_ctx": 8192}


def test_what_leaves_the_answer_as_it_is_is_left_out() -> None:
    said = translated()
    assert translated(user="me", store=True, metadata={"a": "b"}, logit_bias={}) == said


def test_embeddings_take_ollamas_own_options() -> None:
    more = {"dimensions": 8, "options": {"num_ctx": 8192}, "keep_alive": "1h", "truncate": False}
    body = {"model": "ollama/o", "input": ["x"], "encoding_format": "base64", **more}
    assert embed_request(ChatCall("o", body)) == {"model": "o", "input": ["x"], **more}


def test_tools_are_offered_unless_they_must_not_be_called() -> None:
    assert translated(tools=[TOOL], tool_choice="auto")["tools"] == [TOOL]
    assert "tools" not in translated(tools=[TOOL], tool_choice="none")
    assert "tool_choice" not in translated(tools=[TOOL], tool_choice="auto")


LOGPROBS = [
    {
        "token": "é",
        "logprob": -0.1,
        "bytes": [195, 169],
        "top_logprobs": [{"token": "é", "logprob": -0.1, "bytes": [195, 169]}, {"token": "e", "logprob": -3}],
    },
    {"token": "!", "logprob": -0.5},
]
CONTENT = [
    LOGPROBS[0]
    | {"top_logprobs": [LOGPROBS[0]["top_logprobs"][0], {"token": "e", "logprob": -3, "bytes": None}]},
    {"token": "!", "logprob": -0.5, "bytes": None, "top_logprobs": []},
]


def test_logprobs_are_told_as_openai_tells_them() -> None:
    request = translated(logprobs=True, top_logprobs=2)
    assert request["logprobs"] is True and request["top_logprobs"] == 2
    said = {"message": {"content": "é!"}, "logprobs": LOGPROBS, "done": True}
    (choice,) = json.loads(completion_from(said, "m"))["choices"]
    assert ChoiceLogprobs.model_validate(choice["logprobs"])
    assert choice["logprobs"] == {"content": CONTENT, "refusal": None}
    (choice,) = json.loads(completion_from({"message": {"content": "é!"}, "done": True}, "m"))["choices"]
    assert choice["logprobs"] is None


def test_logprobs_of_a_stream_come_with_their_text() -> None:
    translator = StreamTranslator(Completion("m"), wants_usage=False)
    events = []
    for text, logprobs in (("é", LOGPROBS[:1]), ("", LOGPROBS[1:]), ("?", None)):
        line = {"message": {"content": text}, "logprobs": logprobs, "done": False}
        events += translator.feed(json.dumps(line).encode() + b"\n")
    told = [json.loads(event[6:])["choices"][0]["logprobs"] for event in events]
    assert told == [
        {"content": CONTENT[:1], "refusal": None},
        {"content": CONTENT[1:], "refusal": None},
        None,
    ]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"options": ["num_ctx"]},
        {"logit_bias": {"50256": -100}},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
        {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
        {"stop": 5},
        {"stop": {"END": True}},
        {"response_format": "json"},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": "x"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person"}}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b"}}]}
            ]
        },
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    ],
)
def test_what_ollama_cannot_do_is_refused_by_name(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        translated(**body)
    assert caught.value.source == "ollama" and caught.value.param in body


def test_a_tool_call_comes_back_as_openais() -> None:
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}],
    }
    answer = json.loads(completion_from({"message": message, "done": True, "done_reason": "stop"}, "m"))
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"a": 1}'} and call["type"] == "function"
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    translator = StreamTranslator(Completion("m"), wants_usage=False)
    events = translator.feed(
        json.dumps({"message": message, "done": True, "done_reason": "stop"}).encode() + b"\n"
    )
    first, last = json.loads(events[0][6:]), json.loads(events[1][6:])
    assert first["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert last["choices"][0]["finish_reason"] == "tool_calls"


def test_arguments_may_be_an_object_already() -> None:
    called = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Wuhan"}},
    }
    (message,) = translated(messages=[{"role": "assistant", "tool_calls": [called]}])["messages"]
    assert message["tool_calls"] == [{"function": called["function"]}]


def test_calls_of_several_turns_are_told_apart() -> None:
    def answered(name: str) -> dict[str, Any]:
        given = {"message": {"tool_calls": [{"function": {"name": name, "arguments": {}}}]}, "done": True}
        message: dict[str, Any] = json.loads(completion_from(given, "m"))["choices"][0]["message"]
        return message

    turns = [answered("weather"), answered("time")]
    ids = [turn["tool_calls"][0]["id"] for turn in turns]
    assert len(set(ids)) == 2
    # Whoever kept a conversation with another server may bring ids that it used twice.
    for turn in turns:
        turn["tool_calls"][0]["id"] = "call_0"
    said = [*turns, {"role": "tool", "tool_call_id": "call_0", "content": "9:41"}]
    said.insert(1, {"role": "tool", "tool_call_id": "call_0", "content": "31 °C"})
    told = [
        message["tool_name"] for message in translated(messages=said)["messages"] if "tool_name" in message
    ]
    assert told == ["weather", "time"]


def test_thinking_is_kept_apart_from_the_answer() -> None:
    answer = json.loads(completion_from({"message": {"content": "4", "thinking": "2+2"}, "done": True}, "m"))
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "4",
        "refusal": None,
        "reasoning": "2+2",
    }


@pytest.mark.parametrize("line", [b'{"error": "out of memory"}\n', b"not json\n", b'["list"]\n'])
def test_an_error_in_the_stream_ends_it(line: bytes) -> None:
    translator = StreamTranslator(Completion("m"), wants_usage=False)
    (event,) = translator.feed(line)
    assert b'"error"' in event and b'"source":"ollama"' in event
    assert translator.feed(b'{"message": {"content": "more"}, "done": false}\n') == []
    assert translator.close() == []


def test_no_error_is_none() -> None:
    translator = StreamTranslator(Completion("m"), wants_usage=False)
    events = translator.feed(b'{"error": null, "message": {"content": "a"}, "done": true}\n')
    assert events[-1] == DONE and translator.is_done


def test_a_stream_that_was_never_done_says_so() -> None:
    translator = StreamTranslator(Completion("m"), wants_usage=False)
    translator.feed(b'{"message": {"content": "a"}, "done": false}\n')
    assert b"before it was done" in translator.close()[-1]
