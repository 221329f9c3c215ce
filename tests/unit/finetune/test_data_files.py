"""Files are read by what is in them, and a file that cannot be used says where and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sage.tools.finetune.data import load_conversations, load_rows, validate_file
from sage_contracts.errors import InvalidDataError

QA = {"question": "Q?", "answer": "A"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps([QA, QA])),
        ("list.jsonl", json.dumps([QA, QA], indent=2)),
        ("lines.jsonl", json.dumps(QA) + "\n\n" + json.dumps(QA) + "\n"),
        ("lines.json", json.dumps(QA) + "\n" + json.dumps(QA)),
        ("file-without-suffix", "\ufeff" + json.dumps(QA) + "\n" + json.dumps(QA)),
    ],
)
def test_lists_and_lines_are_told_apart_by_content(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [(row.number, row.value) for row in load_rows(path)] == [(1, QA), (2, QA)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "data.json is empty"),
        ("[]", "data.json is empty"),
        (" \n ", "data.json is empty"),
        ('{"rows": [1]}', "not a list"),
        ('{\n "rows": [1]\n}', "not a list"),
        ("7", "not a list"),
        ("hello\nworld\n", "neither JSON nor a table"),
        ('{"a": [{"x": 1}], "b": [{"x": 1}]}', "2 lists of objects"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "upload"
    path.write_text(text)
    with pytest.raises(InvalidDataError, match=said):
        validate_file(path, "data.json")


def test_a_missing_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"There is no file .*gone\.json"):
        validate_file(tmp_path / "gone.json")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02\xff")
    with pytest.raises(InvalidDataError, match="not UTF-8"):
        validate_file(tmp_path / "weights.bin")


def test_the_report_counts_and_names_every_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [QA, {"question": "Q2"}, QA, {"text": "t"}, [1]]
    path.write_text("\n".join(map(json.dumps, rows)))
    report = validate_file(path)
    assert (report.format, report.rows, report.good, report.duplicates) == ("qa", 5, 3, 1)
    assert [(bad.row, bad.field) for bad in report.bad] == [(2, "answer"), (5, "row")]
    with pytest.raises(
        InvalidDataError, match=r"mixed\.jsonl: 2 of 5 rows .* row 2, field answer: is missing"
    ):
        report.require_all_good()
    with pytest.raises(InvalidDataError, match="row 5, field row"):
        load_conversations(path)


def test_conversations_remember_their_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([QA, QA]))
    assert [c.origin for c in load_conversations(path)] == ["row 1 of data.json", "row 2 of data.json"]


def test_a_table_of_one_column_has_no_delimiters(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\nHello, world; hello | all\n"quoted, ""too"""\n')
    assert [c.messages[1]["content"] for c in load_conversations(path)] == [
        "Hello, world; hello | all",
        'quoted, "too"',
    ]
