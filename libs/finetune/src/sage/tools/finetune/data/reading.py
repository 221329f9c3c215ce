"""Rows from whatever people have them in: told apart by content, never by the file's name."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson

from sage.tools.finetune.data.columnar import columnar_rows
from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.encodings import encoding_name, has_fault, marked_faults, possible_encodings
from sage.tools.finetune.data.formats import format_name
from sage.tools.finetune.data.json_members import member_rows, no_rows_in, outline_of, require_no_columns
from sage.tools.finetune.data.json_rows import MAX_ROW_BYTES, Found, document_rows, line_rows, list_rows
from sage.tools.finetune.data.opening import HEAD_BYTES, columnar_kind, head_of, open_plain
from sage.tools.finetune.data.sources import files_of
from sage.tools.finetune.data.tables import EMPTY_ROW, NO_DELIMITER, find_delimiter, table_rows
from sage_contracts.errors import InvalidDataError

_READ_BYTES = 1 << 18
_SAMPLED_LINES = 100
_LINE_CHARS = 16 << 20


class Row(NamedTuple):
    """One row of a file, with its number from 1 as a person would count it (a table's header not counted)."""

    number: int
    value: Any
    file: str
    """The name people know the file by."""

    def content(self) -> Any:
        """Raises: RowError where the row could not even be parsed."""
        if isinstance(self.value, RowError):
            raise self.value
        return self.value

    @property
    def origin(self) -> str:
        return f"row {self.number} of {self.file}"


class Rows:
    """The rows of a file or of a folder of files, read anew by each iteration.

    Iterating raises InvalidDataError for what is missing, empty or no data at all. A row that cannot be
    parsed comes as a row whose content raises.
    """

    def __init__(self, path: Path, display_name: str | None = None) -> None:
        self.path = path
        self.name = display_name or path.name
        self.containers: list[str] = []
        """What the files read so far were: `JSON Lines`, `CSV`, …"""
        self.notes: list[str] = []
        """What a person should know about how the files were read."""

    def __iter__(self) -> Iterator[Row]:
        self.containers.clear()
        self.notes.clear()
        found = False
        for path, name in files_of(self.path, self.name, self.notes):
            empty = 0
            for number, value in enumerate(self._file_rows(path, name), 1):
                if value is EMPTY_ROW:
                    empty += 1
                    continue
                found = True
                yield Row(number, value, name)
            if empty:
                rows = "1 row" if empty == 1 else f"{empty:,} rows"
                self.notes.append(f"{name} has {rows} of empty cells: left out")
        if not found:
            raise InvalidDataError(
                f"{self.name} is empty. Put at least one row in it, or choose another file."
            )

    def _file_rows(self, path: Path, name: str) -> Iterable[Found]:
        head = head_of(path, name)
        if kind := columnar_kind(head):
            return self._told(kind, columnar_rows(path, name, kind))
        found = possible_encodings(head, is_whole=len(head) < HEAD_BYTES)
        if len(found) != 1:
            raise InvalidDataError(_unreadable(name, found))
        (encoding,) = found
        if not encoding.startswith("utf-8"):
            self.notes.append(f"{name} is read as {encoding_name(encoding)}")
        return self._text_rows(path, name, encoding, head.decode(encoding, "ignore").lstrip())

    def _text_rows(self, path: Path, name: str, encoding: str, head: str) -> Iterable[Found]:
        if not head:
            return ()
        if head[0] == "[":
            return self._told("JSON", _read_text(path, name, encoding, list_rows))
        if head[0] == "{":
            first = _first_value(head)
            if _may_be_lines(first, head) and (_is_lines(head) or _has_lines(path, name, encoding, head)):
                return self._told("JSON Lines", _read_lines(path, name, encoding, head))
            if not first:  # it goes on behind the head, or is broken
                return self._told("JSON", self._large_object(path, name, encoding))
            return self._told("JSON", self._documents(path, name, encoding))
        delimiter = find_delimiter(head)
        if delimiter is None:
            raise InvalidDataError(_not_rows(name, head))
        kind = {",": "CSV", NO_DELIMITER: "CSV", "\t": "TSV"}.get(delimiter, f"CSV with {delimiter!r}")
        return self._told(
            kind, _read_text(path, name, encoding, lambda text: table_rows(text, delimiter, name))
        )

    def _documents(self, path: Path, name: str, encoding: str) -> Iterator[Found]:
        """Objects over several lines; a single one may be a row or hold the list of rows."""
        values = _read_text(path, name, encoding, document_rows)
        first = list(islice(values, 2))
        only = first[0] if len(first) == 1 else None
        if not isinstance(only, dict) or format_name(only) is not None:
            if isinstance(only, dict):
                require_no_columns(name, only)
            yield from first
            yield from values
            return
        lists = [key for key in only if _is_list_of_objects(only[key])]
        yield from only[self._only_list(name, lists, only)]

    def _large_object(self, path: Path, name: str, encoding: str) -> Iterator[Found]:
        """Read twice where it holds the rows, so that they need not fit into memory."""
        with open_plain(path, name) as stream, _as_text(stream, encoding, marked_faults()) as text:
            outline = outline_of(text)
        if not outline.is_alone or format_name(outline.fields) is not None:
            yield from self._documents(path, name, encoding)
        elif outline.problem is not None and len(outline.lists) != 1:
            yield outline.problem
        else:
            number = outline.lists[self._only_list(name, list(outline.lists), outline.fields)]
            yield from _read_text(path, name, encoding, lambda text: member_rows(text, number))

    def _only_list(self, name: str, lists: list[str], fields: Iterable[str]) -> str:
        if len(lists) != 1:
            raise InvalidDataError(no_rows_in(name, lists, fields))
        self.notes.append(f"the rows of {name} are the list in its field {lists[0]!r}")
        return lists[0]

    def _told(self, container: str, rows: Iterable[Found]) -> Iterable[Found]:
        self.containers.append(container)
        return rows


def load_rows(path: Path, display_name: str | None = None) -> Rows:
    """The rows of a file, or of every data file in a folder, in order."""
    return Rows(path, display_name)


def _read_lines(path: Path, name: str, encoding: str, head: str) -> Iterator[Found]:
    # Bytes have no lines that end with a carriage return alone.
    if not encoding.startswith("utf-8") or ("\r" in head and "\n" not in head):
        yield from _read_text(path, name, encoding, line_rows)
        return
    with open_plain(path, name) as stream:
        if encoding == "utf-8-sig":
            stream.read(3)
        yield from line_rows(stream)


def _read_text(path: Path, name: str, encoding: str, rows_of: Any) -> Iterator[Found]:
    read = 0
    try:
        with open_plain(path, name) as stream, _as_text(stream, encoding) as text:
            for value in rows_of(text):
                read += 1
                yield value
        return
    except UnicodeDecodeError:
        pass
    # Once more from the start, with marks where bytes are wrong: to look for marks in every row of every
    # file would cost all of them.
    with open_plain(path, name) as stream, _as_text(stream, encoding, marked_faults()) as text:
        for value in islice(rows_of(text), read, None):
            yield _faultless(value, encoding)


def _faultless(value: Found, encoding: str) -> Found:
    what = f"holds bytes that are not {encoding.removesuffix('-sig').upper().replace('_', '-')}"
    if not isinstance(value, dict):
        return RowError("row", what) if has_fault(value) else value
    if has_fault(list(value)):
        return RowError("row", f"has a field whose name {what}")
    field = next((field for field in value if has_fault(value[field])), None)
    return value if field is None else RowError(field, what)


def _as_text(stream: BinaryIO, encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    # Universal newlines would change what is inside quoted cells.
    return io.TextIOWrapper(cast(Any, stream), encoding=encoding, errors=errors, newline="")


def _first_value(head: str) -> str:
    """The text of the value that the head begins with; empty where its end is not within the head."""
    try:
        return head[: json.JSONDecoder().raw_decode(head)[1]]
    except (ValueError, RecursionError):
        return ""


def _may_be_lines(first: str, head: str) -> bool:
    """Whether the first value ends with its line, if it does within the head; of an object that goes on
    behind that, lines may begin with its commas."""
    return (
        "\n" not in first if first else not any(line.lstrip().startswith(",") for line in _first_lines(head))
    )


def _first_lines(head: str) -> list[str]:
    """Without those that are blank."""
    lines = head.split("\n" if "\n" in head else "\r", _SAMPLED_LINES)[:_SAMPLED_LINES]
    return [line for line in lines if line.strip()]


def _is_lines(head: str) -> bool:
    """Whether lines are values of their own: one of the first is a whole object, and there are others."""
    lines = _first_lines(head)
    return len(lines) > 1 and any(line.startswith("{") and _is_object(line) for line in lines)


def _has_lines(path: Path, name: str, encoding: str, head: str) -> bool:
    """The same of a file whose first lines go on behind its head. It stops where a line is longer than a row
    may be."""
    if head.count("\n") >= _SAMPLED_LINES:
        return False
    lines, found, skipped_chars = 0, False, 0
    with open_plain(path, name) as stream, _as_text(stream, encoding, "replace") as text:
        while (
            lines < _SAMPLED_LINES and skipped_chars <= MAX_ROW_BYTES and (line := text.readline(_LINE_CHARS))
        ):
            if len(line) == _LINE_CHARS:
                skipped_chars += len(line)
                continue  # a piece of a line, of which only the last is counted
            lines += bool(line.strip())
            found = found or (line.startswith("{") and _is_object(line))
            if found and lines > 1:
                return True
    return False


def _is_object(line: str) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _unreadable(name: str, encodings: dict[str, str]) -> str:
    if not encodings:
        return (
            f"{name} is not UTF-8 text, nor text in another encoding that can be recognised. "
            "Save it as UTF-8 JSON, JSON Lines or CSV."
        )
    read = " or ".join(f"{encoding} (where it says {word!r})" for encoding, word in encodings.items())
    first = next(iter(encodings))
    files = f"{shlex.quote(name)} > {shlex.quote(f'utf8-{name}')}"
    convert = f"Save it as UTF-8, for {first} with: iconv -f {first} -t utf-8 {files}"
    return f"{name} may be text in {read}: it has too few characters beyond ASCII to tell. {convert}"


def _not_rows(name: str, head: str) -> str:
    try:
        orjson.loads(head)
    except orjson.JSONDecodeError:
        first_line = head.splitlines()[0][:120]
        return (
            f"{name} is neither JSON nor a table with known columns (its first line: {first_line}). Name the "
            "columns of a CSV file in its first line, as in question,answer or instruction,input,output."
        )
    return (
        f"{name} holds one JSON value that is not a list of rows. Put the rows in a list, [{{...}}, {{...}}]."
    )
