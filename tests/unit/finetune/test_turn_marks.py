"""Rows that hold the marks of a chat template: noted, never refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import validate_file
from sage.tools.finetune.data.turn_marks import MarkedRows, turn_marks

ADDED = ["<s>", "<start>", "<end>", "<think>", "<other>", "user", "\n\n"]


def template(turns: list[dict[str, Any]]) -> str:
    said = [f"<start>{turn['role']}\n\n<think>{turn['content']}<end>" for turn in turns]
    return "<s>" + "".join(said).replace("user\n\n<think>", "user\n\n")


def refusing(turns: list[dict[str, Any]]) -> str:
    raise ValueError("no")


def test_marks_are_what_begins_a_users_turn_and_ends_an_assistants() -> None:
    assert turn_marks(template, ADDED) == ["<s>", "<start>", "<end>"]
    assert turn_marks(template, []) == turn_marks(refusing, ADDED) == turn_marks(str, ADDED[1:]) == []
    assert turn_marks(lambda turns: "<s>says nothing", ADDED) == []


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_rows_with_marks_are_counted_once_and_can_be_used(tmp_path: Path, method: str) -> None:
    answers = ["Yes.", "Yes.<end>", "<think>hm</think> <other>", "<start>user\n\nYes?<end>"]
    fields = ("prompt", "completion") if method == "sft" else ("prompt", "chosen", "rejected")
    rows = [dict.fromkeys(fields, answer) | {"rejected": f"No{n}"} for n, answer in enumerate(answers)]
    rows = [{field: row[field] for field in fields} for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path, method=method, marks=MarkedRows(turn_marks(template, ADDED)))
    assert (report.good, report.bad) == (4, [])
    (note,) = report.notes
    assert note.startswith("2 rows have marks")
    assert "row 2 of rows.jsonl holds <end>. " in note
    assert "Give the turns as messages" in note
    path.write_text(json.dumps(rows[0]))
    assert validate_file(path, method=method, marks=MarkedRows(["<end>"])).notes == []
    assert validate_file(path, method=method, marks=MarkedRows()).notes == []
