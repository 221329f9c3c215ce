"""Rows of CSV and TSV: the columns are the fields."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.formats import format_name
from sage.tools.finetune.data.json_rows import Found
from sage.tools.finetune.data.tab_separated import TAB, Lines, Reader, tab_records
from sage_contracts.errors import InvalidDataError

_DELIMITERS = ",\t;|"
NO_DELIMITER = "\uffff"
"""Of a table with one column, whose header cannot tell what would separate others: no character at all."""
EMPTY_ROW: Found = object()
"""Stands for a row whose cells are all empty, as spreadsheets write below a table: only its place counts."""
_MAX_CELL_CHARS = 64 << 20
_HEADER_LINES = 20
_SEPARATOR = re.compile("sep=.?")
_WHAT_TO_DO = "write each quotation mark inside a cell twice and put the cell in quotation marks"
_RULE = re.compile(r"[-:| ]*-[-:| ]*\s*")
"""The line that Markdown draws below a header."""
_MARK_BEHIND_BLANK = re.compile(' +"')
_MARK_LOST = (
    "has a cell that begins with a blank before its quotation mark, so that the marks would be part of the "
    "text and hold no cell together: remove such blanks, or write one behind each delimiter of the header too"
)


def find_delimiter(head: str) -> str | None:
    """What separates the columns whose names make a known format; None when nothing does."""
    headers = {delimiter: _header(head, delimiter) for delimiter in _DELIMITERS}
    known = [d for d in headers if format_name(dict.fromkeys(headers[d], "x"))]
    found = max(known, key=lambda delimiter: len(headers[delimiter]), default=None)
    return NO_DELIMITER if found and len(headers[found]) == 1 else found


def table_rows(text: TextIO, delimiter: str, name: str) -> Iterator[Found]:
    """The rows below the header, the first line that is not blank nor Excel's `sep=;`.

    A row with more or fewer cells than the header is wrong, and so is the header once more, as between files
    that were put together; a row of empty cells alone is EMPTY_ROW.
    Raises: InvalidDataError where two columns have one name.
    """
    csv.field_size_limit(_MAX_CELL_CHARS)
    lines = Lines(text)
    options = _options(lines, delimiter)
    lines.take_again()
    reader = csv.reader(lines, **options)
    columns = _names(_first_record(reader))
    require_names_of_their_own(columns, name, f" in its header (line {reader.line_num})")
    if _is_drawn(options):
        next(reader)  # the rule
    if delimiter == TAB:
        records: Iterator[list[str] | RowError] = tab_records(lines, reader, len(columns))
    else:
        records = _records(lines, reader, options)
    if delimiter == "|" and (options["skipinitialspace"] or _is_drawn(options)):
        records = map(_unpadded, records)
    for cells in records:
        if isinstance(cells, RowError):
            yield cells
        elif _repeats(columns, cells):
            yield RowError("row", "repeats the header: remove it")
        elif cells and not any(map(str.strip, cells)):
            yield EMPTY_ROW
        elif len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))
        elif cells:
            yield RowError("row", f"has {len(cells)} cells where the header has {len(columns)}")


def _options(lines: Iterator[str], delimiter: str) -> dict[str, Any]:
    """How `csv` is to read a table that begins with these lines.

    Where blanks stand behind the header's delimiters, those of the rows are none of their text either. In
    Markdown quotation marks are text. Raises: csv.Error.
    """
    options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    cells = _first_record(csv.reader(lines, **options))[1:]
    is_spaced = any(cells) and all(cell.startswith(" ") for cell in cells if cell)
    is_drawn = delimiter == "|" and _RULE.fullmatch(next(lines, "")) is not None
    quoting = csv.QUOTE_NONE if is_drawn else csv.QUOTE_MINIMAL
    return {**options, "quoting": quoting, "skipinitialspace": is_spaced and delimiter != TAB}


def _is_drawn(options: dict[str, Any]) -> bool:
    """Whether it is a table of Markdown, with a rule below its header."""
    return bool(options["quoting"] == csv.QUOTE_NONE)


def _unpadded(cells: list[str] | RowError) -> list[str] | RowError:
    return cells if isinstance(cells, RowError) else [cell.strip() for cell in cells]


def _repeats(columns: Sequence[str], cells: Sequence[str]) -> bool:
    """Whether these are the header's cells; a second file may begin with a mark of its encoding."""
    if len(cells) != len(columns) or _name_in(cells[-1]) != columns[-1].lower():
        return False  # of nearly every row, at once
    return [_name_in(cell) for cell in cells] == [name.lower() for name in columns]


def _name_in(cell: str) -> str:
    return cell.strip('\ufeff" ').lower()


def _records(lines: Lines, reader: Reader, options: dict[str, Any]) -> Iterator[list[str] | RowError]:
    """`reader` reads `lines` with the options."""
    while True:
        lines.taken.clear()
        lines_before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _broken(error, lines_before + 1, reader.line_num)
        else:
            yield RowError("row", _MARK_LOST) if _has_lost_mark(cells, lines.taken, options) else cells


def _has_lost_mark(cells: Sequence[str], lines: Sequence[str], options: dict[str, Any]) -> bool:
    """Whether blanks are all that stands before a cell's quotation mark; within marks both are text."""
    if ' "' not in "".join(lines) or options["delimiter"] == NO_DELIMITER or _is_drawn(options):
        return False
    if not any(map(_MARK_BEHIND_BLANK.match, cells)):
        return False
    without = next(csv.reader(lines, **{**options, "skipinitialspace": True, "strict": False}))
    return [cell.lstrip(" ") for cell in cells] != [cell.lstrip(" ") for cell in without]


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
        return _names(_first_record(csv.reader(lines, **_options(iter(lines), delimiter))))
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
