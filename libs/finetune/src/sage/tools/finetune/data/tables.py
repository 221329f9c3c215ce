"""Rows of CSV and TSV: the columns are the fields."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import TextIO

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.formats import format_name
from sage.tools.finetune.data.json_rows import MAX_ROW_BYTES, Found
from sage.tools.finetune.data.tab_separated import TAB, Lines, Reader, tab_records
from sage_contracts.errors import InvalidDataError

_DELIMITERS = ",\t;|"
NO_DELIMITER = "\uffff"
"""Of a table with one column, whose header cannot tell what would separate others: no character at all."""
EMPTY_ROW: Found = object()
"""Stands for a row whose cells are all empty, as spreadsheets write below a table: only its place counts."""
_HEADER_LINES = 20
_SEPARATOR = re.compile("sep=.?")
_WHAT_TO_DO = "write each quotation mark inside a cell twice and put the cell in quotation marks"


def find_delimiter(head: str) -> str | None:
    """What separates the columns whose names make a known format; None when nothing does."""
    headers = {delimiter: _header(head, delimiter) for delimiter in _DELIMITERS}
    known = [d for d in headers if format_name(dict.fromkeys(headers[d], "x"))]
    found = max(known, key=lambda delimiter: len(headers[delimiter]), default=None)
    return NO_DELIMITER if found and len(headers[found]) == 1 else found


def table_rows(text: TextIO, delimiter: str, name: str) -> Iterator[Found]:
    """The rows below the header, the first line that is not blank nor Excel's `sep=;`.

    A row with more or fewer cells than the header is wrong; one of empty cells alone is EMPTY_ROW.
    Raises: InvalidDataError where two columns have one name.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = Lines(text) if delimiter == TAB else text
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns = _names(_first_record(reader))
    require_names_of_their_own(columns, name, f" in its header (line {reader.line_num})")
    records = tab_records(lines, reader, len(columns)) if isinstance(lines, Lines) else _records(reader)
    for cells in records:
        if isinstance(cells, RowError):
            yield cells
        elif cells and not any(map(str.strip, cells)):
            yield EMPTY_ROW
        elif len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))
        elif cells:
            yield RowError("row", f"has {len(cells)} cells where the header has {len(columns)}")


def _records(reader: Reader) -> Iterator[list[str] | RowError]:
    while True:
        lines_before = reader.line_num
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _broken(error, lines_before + 1, reader.line_num)


def _broken(error: csv.Error, first_line: int, last_line: int) -> RowError:
    where = f"near line {last_line}; {_WHAT_TO_DO}"
    if str(error) == "unexpected end of data":
        what = f"a quotation mark in the row that begins in line {first_line} is never closed"
        where = f"what follows was not read; {_WHAT_TO_DO}"
        return RowError("row", f"is not valid CSV: {what}; {where}")
    if "expected after" in str(error):  # it names the delimiter, which may be invisible
        return RowError(
            "row", f"is not valid CSV: text follows the closing quotation mark of a cell, {where}"
        )
    if "field limit" in str(error):
        return RowError("row", f"has a cell of more than {MAX_ROW_BYTES >> 20} MiB: make several rows of it")
    return RowError("row", f"is not valid CSV: {error}, near line {last_line}")


def require_names_of_their_own(columns: Sequence[str], name: str, where: str = "") -> None:
    for column in filter(None, columns):
        places = [number for number, other in enumerate(columns, 1) if other == column]
        if len(places) > 1:
            numbers = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
            raise InvalidDataError(
                f"{name} has {len(places)} columns called {column!r}{where}: columns {numbers}. Rename or "
                "remove all but one of them."
            )


def _header(head: str, delimiter: str) -> list[str]:
    try:
        lines = head.splitlines(keepends=True)[:_HEADER_LINES]
        return _names(_first_record(csv.reader(lines, delimiter=delimiter, strict=True)))
    except csv.Error:
        return []


def _first_record(reader: Iterator[list[str]]) -> list[str]:
    filled = (cells for cells in reader if any(cell.strip() for cell in cells))
    return next((cells for cells in filled if not _names_separator(cells)), [])


def _names_separator(cells: list[str]) -> bool:
    """Whether this is the line `sep=;` that Excel wants before the header."""
    return bool(_SEPARATOR.fullmatch(cells[0])) and not any(cells[1:])


def _names(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    lowered = [name.lower() for name in names]
    # Spreadsheets like capitals; a format of one's own may need them.
    return names if format_name(dict.fromkeys(names, "x")) else lowered
