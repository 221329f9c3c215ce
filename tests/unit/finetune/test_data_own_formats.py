"""Formats that somebody adds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sage.tools.finetune.data import (
    FORMATS,
    detect_format,
    load_conversations,
    load_rows,
    to_messages,
    validate_file,
)
from sage_contracts.errors import InvalidDataError


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in to_messages(row)]


def test_a_format_can_be_added() -> None:
    @FORMATS.register("haiku")
    class Haiku:
        def matches(self, row: Any) -> bool:
            return "haiku" in row

        def to_messages(self, row: Any) -> list[Any]:
            return [{"role": "user", "content": "Haiku!"}, {"role": "assistant", "content": row["haiku"]}]

    try:
        assert isinstance(FORMATS.get("haiku"), Haiku)
        assert detect_format([{"haiku": "frog"}]) == "haiku"
        assert turns({"haiku": "frog"}) == [("user", "Haiku!"), ("assistant", "frog")]
        with pytest.raises(ValueError, match="already a format"):
            FORMATS.register("haiku")(Haiku())
    finally:
        FORMATS.remove("haiku")


def test_a_format_of_ones_own_wins_over_the_built_in_ones() -> None:
    class Shouted:
        def matches(self, row: Any) -> bool:
            return "question" in row and "shout" in row

        def to_messages(self, row: Any) -> list[Any]:
            question = row["question"].upper()
            return [{"role": "user", "content": question}, {"role": "assistant", "content": "!"}]

    FORMATS.register("shouted")(Shouted())
    try:
        assert turns({"question": "a", "answer": "b", "shout": 1}) == [("user", "A"), ("assistant", "!")]
        assert turns({"question": "a", "answer": "b"}) == [("user", "a"), ("assistant", "b")]
    finally:
        FORMATS.remove("shouted")


class Ticket:
    """A format of somebody's own, whose author did not think of every row."""

    def __init__(self, content: Any = "text") -> None:
        self.content = content

    def matches(self, row: Mapping[str, Any]) -> bool:
        return "ticket" in row and row["ticket"]["kind"] == "question"

    def to_messages(self, row: Mapping[str, Any]) -> list[Any]:
        return [
            {"role": "user", "content": row["ticket"]["body"]},
            {"role": "assistant", "content": self.content},
        ]


@contextmanager
def registered(row_format: Any) -> Iterator[None]:
    FORMATS.register("ticket")(row_format)
    try:
        yield
    finally:
        FORMATS.remove("ticket")


@pytest.mark.parametrize(
    ("ticket", "content", "reason"),
    [
        ({"kind": "question"}, "text", "the format ticket failed on it (KeyError: 'body')"),
        ({"body": "b"}, "text", "the format ticket failed on it (KeyError: 'kind')"),
        (None, "text", "the format ticket failed on it (TypeError: 'NoneType' object is not subscriptable)"),
        ({"kind": "question", "body": "b"}, None, "whose content is null, not text"),
        ({"kind": "question", "body": "b"}, 7, "whose content is a number, not text"),
    ],
)
def test_where_a_format_of_ones_own_fails_only_the_row_is_bad(
    tmp_path: Path, ticket: Any, content: Any, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q", "answer": "a"}}\n{json.dumps({"ticket": ticket})}\n')
    with registered(Ticket(content)):
        report = validate_file(path)
        with pytest.raises(InvalidDataError, match="row 2, field row: the format ticket"):
            load_conversations(path)
    assert [(bad.row, bad.field) for bad in report.bad] == [(2, "row")]
    assert reason in report.bad[0].reason


def test_a_format_of_ones_own_that_fails_on_a_header_does_not_hide_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,ticket\nq,a,\n")
    with registered(Ticket()):
        assert [row.value["answer"] for row in load_rows(path)] == ["a"]
