"""Rows of CSV, TSV and Parquet: the columns are the fields."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TextIO

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.formats import format_name
from sage.tools.finetune.data.json_rows import Found
from sage.tools.finetune.data.opening import PARQUET, open_plain
from sage_contracts.errors import InvalidDataError

_DELIMITERS = ",\t;|"
NO_DELIMITER = "\0"
"""Of a table with one column, whose header cannot tell what would separate others: no text file has it."""
_MAX_CELL_CHARS = 64 << 20
_BATCH_ROWS = 1024
_PIECE_BYTES = 1 << 16


def find_delimiter(head: str) -> str | None:
    """What separates the columns whose names make a known format; None when nothing does."""
    headers = {delimiter: _header(head, delimiter) for delimiter in _DELIMITERS}
    known = [d for d in headers if format_name(dict.fromkeys(headers[d], "x"))]
    found = max(known, key=lambda delimiter: len(headers[delimiter]), default=None)
    return NO_DELIMITER if found and len(headers[found]) == 1 else found


def table_rows(text: TextIO, delimiter: str) -> Iterator[Found]:
    """The rows below the header. A row with more or fewer cells than the header is wrong."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    columns = _names(next(reader, []))
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError("row", f"is not valid CSV: {error}, near line {reader.line_num}")
            continue
        if len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))
        elif cells:
            yield RowError("row", f"has {len(cells)} cells where the header has {len(columns)}")


def parquet_rows(path: Path, name: str) -> Iterator[Found]:
    """Raises: InvalidDataError, also where pyarrow is not installed."""
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
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from batch.to_pylist()
        except ArrowException as error:
            raise InvalidDataError(f"{name} cannot be read as Parquet: {error}") from error


@contextmanager
def _seekable(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Parquet is read from its end; a compressed file is unpacked for that."""
    with path.open("rb") as stream:
        if stream.read(len(PARQUET)) == PARQUET:
            yield stream
            return
    with TemporaryFile() as unpacked:
        with open_plain(path, name) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        yield unpacked


def _header(head: str, delimiter: str) -> list[str]:
    try:
        return _names(next(csv.reader(head.splitlines(keepends=True)[:20], delimiter=delimiter), []))
    except csv.Error:
        return []


def _names(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    lowered = [name.lower() for name in names]
    # Spreadsheets like capitals; a format of one's own may need them.
    return names if format_name(dict.fromkeys(names, "x")) else lowered
