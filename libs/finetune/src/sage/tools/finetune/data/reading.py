"""Rows from files. JSON lists and JSON Lines, told apart by their first character, not by the file's name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sage_contracts.errors import InvalidDataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, with its number from 1 as a person would count it."""

    number: int
    value: Any


def load_rows(path: Path, display_name: str | None = None) -> Iterator[Row]:
    """The rows of a JSON list or a JSON Lines file, in order.

    Raises: InvalidDataError for a missing, empty or unreadable file, or JSON that is not a list.
    """
    name = display_name or path.name
    if not path.is_file():
        raise InvalidDataError(f"There is no file {name}. Give the path of a JSON or JSONL file.")
    found = False
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for row in _rows(stream, name):
                found = True
                yield row
    except UnicodeDecodeError as error:
        raise InvalidDataError(
            f"{name} is not UTF-8 text (byte {error.start}). Save it as UTF-8 JSON or JSONL."
        ) from error
    if not found:
        raise InvalidDataError(f"{name} is empty. Put at least one row in it, or choose another file.")


def _rows(stream: TextIO, name: str) -> Iterator[Row]:
    first = stream.read(1)
    while first and first.isspace():
        first = stream.read(1)
    if not first:
        return
    stream.seek(0)
    if first == "[":
        yield from _list_rows(stream.read(), name)
    elif name.lower().endswith(".json"):
        text = stream.read()
        if _is_one_document(text):
            raise InvalidDataError(
                f"{name} holds one JSON value that is not a list of rows. Put the rows in a list, "
                "[{...}, {...}], or write one object per line and call the file .jsonl."
            )
        yield from _line_rows(text.splitlines(), name)
    else:
        yield from _line_rows(stream, name)


def _list_rows(text: str, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidDataError(
            f"{name} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from error
    for number, value in enumerate(rows, start=1):
        yield Row(number, value)


def _line_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        number += 1
        try:
            yield Row(number, json.loads(line))
        except json.JSONDecodeError as error:
            raise InvalidDataError(
                f"{name}, line {line_number} is not valid JSON: {error.msg} at column {error.colno}. "
                "Write one JSON object per line, or one JSON list."
            ) from error


def _is_one_document(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
