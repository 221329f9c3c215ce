"""Rows of every format become the conversation they mean; rows that cannot be used say why."""

from __future__ import annotations

from typing import Any

import pytest

from sage.tools.finetune.data import FORMATS, RowError, detect_format, to_messages


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
            "messages[1].tool_calls",
            "not supported",
        ),
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


def test_a_format_can_be_added() -> None:
    class Haiku:
        def matches(self, row: Any) -> bool:
            return "haiku" in row

        def to_messages(self, row: Any) -> list[Any]:
            return [{"role": "user", "content": "Haiku!"}, {"role": "assistant", "content": row["haiku"]}]

    FORMATS.register("haiku")(Haiku())
    try:
        assert detect_format([{"haiku": "frog"}]) == "haiku"
        assert turns({"haiku": "frog"}) == [("user", "Haiku!"), ("assistant", "frog")]
        with pytest.raises(ValueError, match="already a format"):
            FORMATS.register("haiku")(Haiku())
    finally:
        FORMATS.remove("haiku")
