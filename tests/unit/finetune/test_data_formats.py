"""Rows of every format become the conversation they mean; rows that cannot be used say why."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sage.tools.finetune.data import (
    RowError,
    detect_format,
    to_messages,
)
from sage.tools.finetune.data.formats import to_conversation


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in to_messages(row)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [("user", "Add.\n\n1 2"), ("assistant", "3")],
        ),
        ({"instruction": "Hi", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be kind"},
            [("system", "Be kind"), ("user", "Hi"), ("assistant", "Hello")],
        ),
        ({"question": "Q?", "answer": "A"}, [("user", "Q?"), ("assistant", "A")]),
        (
            {"question": "Q?", "answer": "A", "context": "C"},
            [("user", "C\n\nQ?"), ("assistant", "A")],
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "system": "S",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            [("system", "S"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    },
                    {"role": "assistant", "content": "c"},
                ]
            },
            [("system", "S"), ("user", "ab"), ("assistant", "c")],
        ),
        ({"prompt": "p", "completion": "c"}, [("user", "p"), ("assistant", "c")]),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "c"}],
            },
            [("user", "p"), ("assistant", "c")],
        ),
        ({"text": "story"}, [("user", ""), ("assistant", "story")]),
    ],
)
def test_each_format_becomes_a_conversation(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


@pytest.mark.parametrize("field", ["answer", "output", "completion", "response", "summary"])
def test_a_text_with_an_answer_beside_it_is_not_learned_in_its_place(field: str) -> None:
    row = {"text": "Q?", field: "A"}
    with pytest.raises(
        RowError, match=f"^text: stands beside {field}.*rename text to.*else remove"
    ) as refused:
        to_messages(row)
    names = dict(re.findall(r"(\w+) to (\w+)", str(refused.value)[str(refused.value).index("rename") :]))
    assert turns({names.get(name, name): value for name, value in row.items()}) == [
        ("user", "Q?"), ("assistant", "A"),
    ]  # fmt: skip
    for empty in (None, "", " ", 5, {}):
        assert turns({"text": "story", field: empty}) == [("user", ""), ("assistant", "story")]


def test_an_opening_greeting_of_the_assistant_is_left_out() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "gpt", "value": "Welcome!"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    }
    assert turns(row) == [("system", "S"), ("user", "a"), ("assistant", "b")]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (TURNS[:1], TURNS[1:]),
        (json.dumps(TURNS[:1]), json.dumps(TURNS[1:])),
        (json.dumps(TURNS[:1], indent=1), "\n[ " + json.dumps(TURNS[1]) + "]"),
        ("q", json.dumps([{"from": "gpt", "value": "a"}])),
        (TURNS[:1], "a"),
    ],
)
def test_turns_on_either_side_of_a_prompt_and_completion_are_turns(prompt: Any, completion: Any) -> None:
    assert turns({"prompt": prompt, "completion": completion}) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "answer",
    [
        "[1, 2]",
        "[]",
        "[{",
        '[{"from": "ZRH", "to": "BSL"}]',
        '[{"role": "admin", "name": "Ada"}]',
        "[{'role': 'admin'}]",
        "[x for x in {}]",
        '[{"role": "user", "content": "q"}, 1]',
    ],
)
def test_an_answer_in_json_or_python_that_is_no_list_of_turns_stays_text(answer: str) -> None:
    assert turns({"prompt": "q", "completion": answer}) == [("user", "q"), ("assistant", answer)]


@pytest.mark.parametrize(
    ("completion", "field", "reason"),
    [
        ('[{"role": "asistant", "content": "a"}]', "completion[0].role", "'asistant'"),
        ('[{"role": "assistant", "content": ""}]', "completion[0].content", "empty"),
        ('[{"role": "assistant"}]', "completion[0].content", "missing"),
        ("[{'role': 'assistant', 'content': 'a'}]", "completion", "json.dumps"),
        ("[{'from': 'gpt',\n 'value': 'a'}]", "completion", "json.dumps"),
        # As pandas writes an array of turns: without commas.
        (
            "[{'content': 'a', 'role': 'assistant'}\n {'content': 'b', 'role': 'user'}]",
            "completion",
            "Python's",
        ),
    ],
)
def test_a_faulty_list_of_turns_is_not_learned_as_text(completion: str, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages({"prompt": "q", "completion": completion})
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_weight_is_kept() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 1},
        ]
    }
    assert [message.get("weight") for message in to_messages(row)] == [None, 0, None, 1]


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"instruction": "Hi"}, "output", "missing"),
        ({"instruction": "Hi", "output": "  "}, "output", "empty"),
        ({"instruction": "", "output": "x"}, "instruction", "empty"),
        ({"question": "Q", "answer": None}, "answer", "missing"),
        ({"question": "Q", "answer": 7}, "answer", "a number"),
        ({"prompt": "p"}, "completion", "no answer"),
        ({"text": ""}, "text", "empty"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "no turn of the user"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role", "'boss'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            "messages[1].content",
            "no answer",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": None, "tool_calls": [{}]},
                ]
            },
            "messages[1].tool_calls[0]",
            "no function with a name",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "row", "use method=dpo, orpo or kto"),
        ({"prompt": "p", "completion": "c", "label": True}, "label", "use method=kto"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "weight": 0},
                ]
            },
            "messages",
            "no answer",
        ),
        ({"conversations": "hello"}, "conversations", "list of turns"),
        ({"a": 1}, "row", "no known format"),
        ([1], "row", "a list"),
        (None, "row", "null"),
    ],
)
def test_an_unusable_row_names_field_and_reason(row: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages(row)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_the_format_of_a_file_is_that_of_most_rows() -> None:
    rows = [{"question": "a", "answer": "b"}] * 2 + [{"text": "c"}]
    assert detect_format(rows) == "qa"
    assert detect_format([{"nothing": 1}]) is None
    assert detect_format([]) is None


def test_columns_that_other_formats_left_empty_do_not_decide() -> None:
    row = {"instruction": "", "output": None, "messages": None, "question": "Q?", "answer": "A"}
    assert turns(row) == [("user", "Q?"), ("assistant", "A")]
    with pytest.raises(RowError, match="answer: is missing"):
        to_messages(row | {"answer": ""})


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tool_calls_are_kept_with_their_arguments_as_objects() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": [TOOL],
    }
    found = to_conversation(row, "row 1")
    assert found.tools == [TOOL]
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    ]
    assert found.messages[2] == {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}


def test_tool_calls_of_sharegpt_and_of_the_older_api_are_read_the_same() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
    }
    older = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "assistant", "content": "b"},
        ],
        "functions": [{"name": "add", "parameters": {"type": "object"}}],
    }
    for row in (sharegpt, older):
        found = to_conversation(row, "row 1")
        assert found.tools == [TOOL]
        assert found.messages[1].get("tool_calls") == [call]
        assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]


def test_roles_are_known_whatever_their_case() -> None:
    said = '{"name": "add", "arguments": {"a": 1}}'
    turns = [{"from": "Human", "value": "a"}, {"from": "Function_Call", "value": said}]
    (_, call) = to_messages({"conversations": turns})
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_a_call_without_arguments_that_has_parameters_is_refused() -> None:
    call = {"name": "add", "parameters": {"a": 1}}
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)}]
    with pytest.raises(RowError, match=r"conversations\[1\]\.value: is a call .*parameters.*arguments"):
        to_messages({"conversations": turns})
    assert to_messages({"conversations": [turns[0], turns[1] | {"value": '{"name": "now"}'}]})


def test_arguments_that_are_no_json_are_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": "{a"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(RowError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments: is not valid"):
        to_messages({"messages": [{"role": "user", "content": "a"}, turn]})


def test_a_system_field_beside_turns_of_any_format_comes_first() -> None:
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    expected = [("system", "S"), ("user", "a"), ("assistant", "b")]
    assert turns({"system": "S", "messages": [asked, said]}) == expected
    assert turns({"system": "S", "prompt": [asked], "completion": [said]}) == expected


def test_a_system_prompt_is_a_system_field_by_another_name() -> None:
    for row in ({"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}):
        assert turns({"system_prompt": "S", **row}) == [("system", "S"), ("user", "a"), ("assistant", "b")]
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert turns({"system_prompt": "S", "messages": [asked, said]})[0] == ("system", "S")
    with pytest.raises(RowError, match=r"system_prompt: is a number, not text"):
        turns({"system_prompt": 1, "messages": [asked, said]})


def test_an_alpaca_rows_history_is_what_was_said_before() -> None:
    row = {"system": "S", "instruction": "i", "output": "o", "history": [["u1", "a1"], ["u2", "a2"]]}
    before = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
    rest = [("user", "i"), ("assistant", "o")]
    assert turns(row) == [("system", "S"), *before, *rest]
    assert turns({**row, "history": json.dumps(row["history"])}) == [("system", "S"), *before, *rest]
    for history in ([], None, ""):
        assert turns({**row, "history": history}) == [("system", "S"), *rest]
    for history in (["u1", "a1"], [["u1"]], [["u1", ""]], [["u1", 1]], "u1", {"u1": "a1"}):
        with pytest.raises(RowError, match=r"history: .*pairs"):
            turns({**row, "history": history})


def test_an_alpaca_rows_material_may_be_called_context() -> None:
    row = {"instruction": "i", "context": "c", "output": "o"}
    assert turns(row) == [("user", "i\n\nc"), ("assistant", "o")]
    assert turns({**row, "input": "x"}) == [("user", "i\n\nx"), ("assistant", "o")]


def test_turns_may_be_columns_as_sequences_of_datasets_are() -> None:
    columns = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert turns({"conversations": columns}) == [("user", "a"), ("assistant", "b")]
    for broken in ({}, {"from": ["human"], "value": []}, {"from": "human", "value": "a"}):
        with pytest.raises(RowError, match="must be a list of turns"):
            turns({"conversations": broken})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "i", "response": "r"}, "output: is missing.*rename its field response"),
        ({"custom_id": "1", "body": {"messages": []}}, "row: is a line of an OpenAI batch.*custom_id"),
    ],
)
def test_what_other_tools_write_is_said_how_to_bring(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        to_messages(row)


def test_a_system_field_may_repeat_the_system_turn_but_not_contradict_it() -> None:
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    own = {"role": "system", "content": " S\n"}
    rest = [("user", "a"), ("assistant", "b")]
    for system in ("S", "", None):
        assert turns({"system": system, "messages": [own, asked, said]}) == [("system", " S\n"), *rest]
    empty = {"role": "system", "content": " "}
    assert turns({"system": "S", "messages": [empty, asked, said]}) == [("system", "S"), *rest]
    with pytest.raises(RowError, match="system: says something else than the system turn"):
        turns({"system": "other", "messages": [own, asked, said]})
    with pytest.raises(RowError, match="system: says something else than the system turn"):
        turns({"system": "other", "prompt": [own, asked], "completion": [said]})
