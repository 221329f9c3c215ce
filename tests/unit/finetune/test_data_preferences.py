"""Preference pairs and rated answers, in every shape people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import (
    PreferencePair,
    RatedAnswer,
    RowError,
    load_conversations,
    load_preferences,
    load_rated_answers,
    validate_file,
)
from sage.tools.finetune.data.preferences import to_preference
from sage_contracts.errors import InvalidDataError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "S"}
TEXT = {"prompt": "p", "chosen": "good", "rejected": "bad"}
EMPTY = json.dumps([says("")])
MISSPELT = json.dumps([{"role": "asistant", "content": "a"}])
OPENAI = {
    "input": {"messages": [user("p")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [says("good")],
    "non_preferred_output": [says("bad")],
}


@pytest.mark.parametrize(
    "row",
    [
        TEXT,
        OPENAI,
        {"prompt": [user("p")], "chosen": [says("good")], "rejected": [says("bad")]},
        {"prompt": [user("p")], "chosen": says("good"), "rejected": says("bad")},
        {"chosen": [user("p"), says("good")], "rejected": [user("p"), says("bad")]},
        {"prompt": "p", "chosen": [user("p"), says("good")], "rejected": [user("p"), says("bad")]},
        {"instruction": "p", "input": "", "chosen": "good", "rejected": "bad"},
        {"question": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "instruction": "", "question": None, "chosen": "good", "rejected": "bad"},
        {"instruction": "", "question": "p", "prompt": "", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"prompt": "p", "chosen": json.dumps([says("good")]), "rejected": json.dumps([says("bad")])},
        {
            "prompt": json.dumps([user("p")], indent=1),
            "chosen": "\n" + json.dumps([says("good")], indent=1),
            "rejected": "[ " + json.dumps(says("bad")) + " ]",
        },
    ],
)
def test_a_pair_in_any_shape_is_the_same_pair(row: dict[str, Any]) -> None:
    expected = PreferencePair([user("p")], [says("good")], [says("bad")], "row 1")  # type: ignore[list-item]
    assert to_preference(row, "row 1") == expected


def test_the_shared_prompt_of_two_conversations_is_all_they_have_in_common() -> None:
    shared = [SYSTEM, user("a"), says("b"), user("c")]
    row = {"chosen": [*shared, says("x")], "rejected": [*shared, says("y")]}
    pair = to_preference(row, "")
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt_messages, pair.chosen, pair.rejected) == (shared, [says("x")], [says("y")])


def test_text_that_looks_like_a_list_stays_text() -> None:
    pair = to_preference({"prompt": "p", "chosen": "[{x}]", "rejected": "[1]"}, "")
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen, pair.rejected) == ([says("[{x}]")], [says("[1]")])


@pytest.mark.parametrize(
    ("label", "is_desirable"),
    [(True, True), (False, False), ("false", False), (1, True), ("1.0", True), ("0.0", False)],
)
def test_a_rated_answer_is_wanted_or_not(label: Any, is_desirable: bool) -> None:
    row = {"prompt": "p", "completion": "a", "label": label}
    expected = RatedAnswer([user("p")], [says("a")], is_desirable, "o")  # type: ignore[list-item]
    assert to_preference(row, "o") == expected


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "p", "chosen": "good"}, "rejected", "missing"),
        ({"prompt": "p", "chosen": "", "rejected": "bad"}, "chosen", "empty"),
        ({"chosen": "good", "rejected": "bad"}, "prompt", "whole conversations"),
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "rejected", "nothing to prefer"),
        ({"prompt": [says("x")], "chosen": "a", "rejected": "b"}, "prompt", "no turn of the user"),
        ({"prompt": [user("p"), says("x")], "chosen": "a", "rejected": "b"}, "prompt", "must end"),
        ({"chosen": [user("p"), says("x")], "rejected": [user("q"), says("y")]}, "rejected", "same prompt"),
        ({"chosen": [user("p")], "rejected": [user("p")]}, "chosen", "does not end"),
        (OPENAI | {"input": "p"}, "input", "not an object"),
        (OPENAI | {"preferred_output": None}, "preferred_output", "list of turns"),
        ({"prompt": "p", "completion": "a", "label": "maybe"}, "label", "use true"),
        ({"prompt": "p", "completion": "a"}, "row", "use method=sft"),
        ({"question": "p", "answer": "a"}, "row", "use method=sft"),
        ({"prompt": "p", "completion": "a", "label": None}, "label", "missing"),
        ({"prompt": "p", "completion": "", "label": False}, "completion", "empty"),
        ({"prompt": "p", "completion": None, "label": True}, "completion", "missing"),
        ({"prompt": None, "completion": "a", "label": True}, "prompt", "is missing"),
        ({"question": "p", "completion": "", "label": True}, "completion", "empty"),
        ({"prompt": "p", "chosen": "", "rejected": ""}, "chosen", "empty"),
        ({"question": "p", "answer": "a", "chosen": "", "rejected": ""}, "row", "format qa, which says no"),
        ({"prompt": "p", "chosen": EMPTY, "rejected": "b"}, "chosen[0].content", "empty"),
        ({"prompt": "p", "chosen": MISSPELT, "rejected": "b"}, "chosen[0].role", "'asistant'"),
        ({"prompt": "p", "chosen": str([says("a")]), "rejected": "b"}, "chosen", "json.dumps"),
        ({"prompt": str([user("p")]), "chosen": "a", "rejected": "b"}, "prompt", "json.dumps"),
    ],
)
def test_an_unusable_preference_names_field_and_reason(row: Any, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_preference(row, "row 1")
    assert caught.value.field == field
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "p"},
        {"question": "p"},
        {"instruction": "p", "input": ""},
        {"messages": [user("p")]},
        {"conversations": json.dumps([user("p")])},
    ],
)
def test_whatever_may_stand_for_the_prompt_of_a_pair_may_for_that_of_a_rated_answer(prompt: Any) -> None:
    expected = RatedAnswer([user("p")], [says("a")], True, "row 1")  # type: ignore[list-item]
    assert to_preference({**prompt, "completion": "a", "label": "true"}, "row 1") == expected


def test_empty_answers_of_every_method_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rated.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,,false\nd,e,\n,f,true\n")
    report = validate_file(path, method="kto")
    assert "chosen" not in " ".join(bad.reason for bad in report.bad)
    assert [(bad.row, bad.field) for bad in report.bad] == [(2, "completion"), (3, "label"), (4, "prompt")]
    assert report.empty_answers == 1


def test_files_of_pairs_serve_every_preference_method_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(TEXT) + "\n" + json.dumps(OPENAI))
    assert [pair.origin for pair in load_preferences(path)] == [
        "row 1 of pairs.jsonl",
        "row 2 of pairs.jsonl",
    ]
    assert [r.is_desirable for r in load_rated_answers(path)] == [True, False, True, False]
    with pytest.raises(InvalidDataError) as wrong:
        load_conversations(path)
    reason = "holds preference pairs: use method=dpo, orpo or kto"
    assert wrong.value.message == f"pairs.jsonl: 2 of 2 rows cannot be used: rows 1, 2, field row: {reason}."
    path.write_text(path.read_text() + '\n{"question": "a", "answer": "b"}')
    with pytest.raises(InvalidDataError) as some:
        load_conversations(path)
    wanted = (
        f"pairs.jsonl: 2 of 3 rows cannot be used: rows 1, 2, field row: {reason}. Correct or remove them."
    )
    assert some.value.message == wanted


def test_rated_answers_are_for_kto_alone(tmp_path: Path) -> None:
    path = tmp_path / "rated.json"
    path.write_text(json.dumps([{"prompt": "p", "completion": "a", "label": False}]))
    assert [r.is_desirable for r in load_rated_answers(path)] == [False]
    with pytest.raises(InvalidDataError, match="use method=kto"):
        load_preferences(path)


@pytest.mark.parametrize(
    "row", [OPENAI, {"chosen": [user("p"), says("good")], "rejected": [user("p"), says("bad")]}]
)
def test_a_system_field_is_part_of_the_prompt_alone(row: dict[str, Any]) -> None:
    pair = to_preference({**row, "system": "S"}, "")
    assert isinstance(pair, PreferencePair)
    assert pair.prompt_messages == [SYSTEM, user("p")]
    assert (pair.chosen, pair.rejected) == ([says("good")], [says("bad")])


@pytest.mark.parametrize("label", [True, False, "0"])
def test_a_rated_answer_is_for_kto_alone(tmp_path: Path, label: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "a", "label": label}))
    for method in ("sft", "dpo", "orpo"):
        (bad,) = validate_file(path, method=method).bad
        assert (bad.field, bad.reason.startswith("rates a single answer")) == ("label", True)
        assert bad.reason.endswith(": use method=kto")
    assert validate_file(path, method="kto").good == 1
