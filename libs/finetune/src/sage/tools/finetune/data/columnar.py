"""Rows of Parquet and Arrow files, read by pyarrow: the columns are the fields."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from sage.tools.finetune.data.conversation import RowError
from sage.tools.finetune.data.json_rows import Found
from sage.tools.finetune.data.opening import MAGIC_BYTES, columnar_kind, open_plain
from sage.tools.finetune.data.tables import require_names_of_their_own
from sage.tools.finetune.storage import temporary_folder_errors
from sage_contracts.errors import InvalidDataError

_BATCH_ROWS = 1024
_AS_OBJECTS: dict[str, Any] = {"maps_as_pydicts": "strict"}
"""How maps are read, at any depth; by default they become lists of pairs."""
_PIECE_BYTES = 1 << 16
_UNREADABLE = (ValueError, OverflowError, OSError, KeyError)
"""Of a value that is no UTF-8 or out of Python's range, a damaged page, and a map that has a key twice."""


def columnar_rows(path: Path, name: str, kind: str) -> Iterator[Found]:
    """Of a file of that `columnar_kind`. Raises: InvalidDataError, also where pyarrow is not installed;
    StorageFullError."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        what = "an Arrow" if kind == "Arrow" else "a Parquet"
        raise InvalidDataError(
            f"{name} is {what} file, which cannot be read here: pyarrow is not installed. Convert it to "
            "JSON Lines, or use `sage finetune start --data` on a machine with pyarrow: it converts."
        ) from error
    with _seekable(path, name) as stream:
        try:
            for batch in (_arrow_batches if kind == "Arrow" else _parquet_batches)(stream, name):
                yield from _values(batch)
        except MemoryError:
            raise  # pyarrow's is an ArrowException too, and says nothing about the file
        except (ArrowException, *_UNREADABLE) as error:
            raise InvalidDataError(f"{name} cannot be read as {kind}: {error}") from error


def _parquet_batches(stream: IO[bytes], name: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # In small pieces: by default a whole row group, often the whole file, is held in memory.
    file = ParquetFile(stream, buffer_size=_PIECE_BYTES, pre_buffer=False)
    require_names_of_their_own(file.schema_arrow.names, name)
    yield from file.iter_batches(_BATCH_ROWS)


def _arrow_batches(stream: IO[bytes], name: str) -> Iterator[Any]:
    """Of a file (Feather) or of a stream, as `save_to_disk` of `datasets` writes."""
    from pyarrow import ipc

    is_file = stream.read(MAGIC_BYTES).startswith(b"ARROW1")
    stream.seek(0)
    reader = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
    require_names_of_their_own(reader.schema.names, name)
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            yield batch.slice(start, _BATCH_ROWS)


def _values(batch: Any) -> list[Found]:
    """A batch's rows; those with a value that Python cannot hold, such as the year 10000, as errors."""
    try:
        rows: list[Found] = batch.to_pylist(**_AS_OBJECTS)
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
            column.to_pylist(**_AS_OBJECTS)
        except _UNREADABLE as error:
            return RowError(field, f"cannot be read ({error})")
    return single.to_pylist(**_AS_OBJECTS)[0]


@contextmanager
def _seekable(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Such files are read from their end; a compressed one is unpacked for that. Raises: StorageFullError."""
    with path.open("rb") as stream:
        if columnar_kind(stream.read(MAGIC_BYTES)):
            stream.seek(0)
            yield stream
            return
    with ExitStack() as stack:
        with temporary_folder_errors(), open_plain(path, name) as packed:
            unpacked = stack.enter_context(TemporaryFile())
            shutil.copyfileobj(packed, unpacked, 1 << 20)
            unpacked.seek(0)
        yield unpacked
