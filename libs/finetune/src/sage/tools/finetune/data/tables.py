"""Rows of CSV, TSV and Parquet: the columns are the fields."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TextIO

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.formats import format_name
from sage.tools.finetune.data.json_rows import Found
from sage.tools.finetune.data.opening import PARQUET, open_plain
from sage.tools.finetune.data.tab_separated import TAB, Lines, Reader, tab_records
from sage.tools.finetune.storage import temporary_folder_errors
from sage_contracts.errors import InvalidDataError

_DELIMITERS = ",\t;|"
NO_DELIMITER = "\uffff"
"""Of a table with one column, whose header cannot tell what would separate others: no character at all."""
_MAX_CELL_CHARS = 64 << 20
_HEADER_LINES = 20
_BATCH_ROWS = 1024
_PIECE_BYTES = 1 << 16
_WHAT_TO_DO = "write each quotation mark inside a cell twice and put the cell in quotation marks"
_UNREADABLE = (ValueError, OverflowError, OSError)
"""Of a value that is no UTF-8 or out of Python's range, and of a damaged page."""


def find_delimiter(head: str) -> str | None:
    """What separates the columns whose names make a known format; None when nothing does."""
    headers = {delimiter: _header(head, delimiter) for delimiter in _DELIMITERS}
    known = [d for d in headers if format_name(dict.fromkeys(headers[d], "x"))]
    found = max(known, key=lambda delimiter: len(headers[delimiter]), default=None)
    return NO_DELIMITER if found and len(headers[found]) == 1 else found


def table_rows(text: TextIO, delimiter: str, name: str) -> Iterator[Found]:
    """The rows below the header, the first line that is not blank. A row with more or fewer cells than the
    header is wrong. Raises: InvalidDataError where two columns have one name."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    lines = Lines(text) if delimiter == TAB else text
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns = _names(_first_record(reader))
    _require_names_of_their_own(columns, name, f" in its header (line {reader.line_num})")
    records = tab_records(lines, reader, len(columns)) if isinstance(lines, Lines) else _records(reader)
    for cells in records:
        if isinstance(cells, RowError):
            yield cells
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
    return RowError("row", f"is not valid CSV: {error}, near line {last_line}")


def _require_names_of_their_own(columns: Sequence[str], name: str, where: str = "") -> None:
    for column in filter(None, columns):
        places = [number for number, other in enumerate(columns, 1) if other == column]
        if len(places) > 1:
            numbers = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
            raise InvalidDataError(
                f"{name} has {len(places)} columns called {column!r}{where}: columns {numbers}. Rename or "
                "remove all but one of them."
            )


def parquet_rows(path: Path, name: str) -> Iterator[Found]:
    """Raises: InvalidDataError, also where pyarrow is not installed; StorageFullError."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InvalidDataError(
            f"{name} is a Parquet file, which cannot be read here: pyarrow is not installed. Convert it to "
            "JSON Lines, or use `sage finetune start --data` on a machine with pyarrow: it converts."
        ) from error
    with _seekable(path, name) as stream:
        try:
            # In small pieces: by default a whole row group, often the whole file, is held in memory.
            file = ParquetFile(stream, buffer_size=_PIECE_BYTES, pre_buffer=False)
            _require_names_of_their_own(file.schema_arrow.names, name)
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from _values(batch)
        except (ArrowException, *_UNREADABLE) as error:
            raise InvalidDataError(f"{name} cannot be read as Parquet: {error}") from error


def _values(batch: Any) -> list[Found]:
    """A batch's rows; those with a value that Python cannot hold, such as the year 10000, as errors."""
    try:
        rows: list[Found] = batch.to_pylist()
    except _UNREADABLE:
        rows = [_value(batch.slice(row, 1)) for row in range(batch.num_rows)]
    nested = [column.name for column in batch.schema if column.type.num_fields]
    for row in rows if nested else ():
        if not isinstance(row, RowError):
            row.update({name: _own_fields(row[name]) for name in nested})
    return rows


def _own_fields(value: Any) -> Any:
    """A nested value with the fields that it has itself.

    One type stands for all rows, so that a call has the arguments of every other one too, as nulls: learned,
    they would be called with.
    """
    if isinstance(value, dict):
        return {name: _own_fields(inner) for name, inner in value.items() if inner is not None}
    return [_own_fields(inner) for inner in value] if isinstance(value, list) else value


def _value(single: Any) -> Found:
    for field, column in zip(single.schema.names, single.columns, strict=True):
        try:
            column.to_pylist()
        except _UNREADABLE as error:
            return RowError(field, f"cannot be read ({error})")
    return single.to_pylist()[0]


@contextmanager
def _seekable(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Parquet is read from its end; a compressed file is unpacked for that. Raises: StorageFullError."""
    with path.open("rb") as stream:
        if stream.read(len(PARQUET)) == PARQUET:
            yield stream
            return
    with ExitStack() as stack:
        with temporary_folder_errors(), open_plain(path, name) as packed:
            unpacked = stack.enter_context(TemporaryFile())
            shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.flush()
        yield unpacked


def _header(head: str, delimiter: str) -> list[str]:
    try:
        lines = head.splitlines(keepends=True)[:_HEADER_LINES]
        return _names(_first_record(csv.reader(lines, delimiter=delimiter, strict=True)))
    except csv.Error:
        return []


def _first_record(reader: Iterator[list[str]]) -> list[str]:
    return next((cells for cells in reader if any(cell.strip() for cell in cells)), [])


def _names(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    lowered = [name.lower() for name in names]
    # Spreadsheets like capitals; a format of one's own may need them.
    return names if format_name(dict.fromkeys(names, "x")) else lowered
