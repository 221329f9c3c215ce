"""What a file holds and which of its rows cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.formats import format_name, to_conversation, to_messages
from sage.tools.finetune.data.reading import load_rows
from sage_contracts.errors import InvalidDataError

SHOWN_BAD_ROWS = 5

T = TypeVar("T")


class BadRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    row: int
    """From 1."""
    field: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, field {self.field}: {self.reason}"


class DataReport(BaseModel):
    """The outcome of reading every row of one file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    format: str | None
    """That of most rows."""
    rows: int
    good: int
    bad: list[BadRow] = Field(default_factory=list)
    duplicates: int = 0
    """Good rows whose conversation was seen before."""

    def require_all_good(self) -> None:
        """Raises: InvalidDataError, naming the first bad rows."""
        if self.bad:
            raise InvalidDataError(_bad_rows_message(self.name, self.rows, self.bad))


def validate_file(path: Path, display_name: str | None = None) -> DataReport:
    """Read every row and say which cannot be used.

    Raises: InvalidDataError when the file as a whole cannot be read (missing, empty, not a list).
    """
    name = display_name or path.name
    formats: Counter[str] = Counter()
    bad: list[BadRow] = []
    seen: set[bytes] = set()
    rows = duplicates = 0
    for row in load_rows(path, name):
        rows += 1
        if (found := format_name(row.value)) is not None:
            formats[found] += 1
        try:
            key = conversation_key(to_messages(row.value))
        except RowError as error:
            bad.append(BadRow(row=row.number, field=error.field, reason=error.reason))
            continue
        duplicates += key in seen
        seen.add(key)
    return DataReport(
        name=name,
        format=formats.most_common(1)[0][0] if formats else None,
        rows=rows,
        good=rows - len(bad),
        bad=bad,
        duplicates=duplicates,
    )


def load_conversations(path: Path, display_name: str | None = None) -> list[Conversation]:
    """Every row as chat messages. Raises: InvalidDataError, naming the first bad rows."""
    return load_each(path, to_conversation, display_name)


def load_each(path: Path, read: Callable[[Any, str], T], display_name: str | None = None) -> list[T]:
    """What `read(row, origin)` makes of every row. Raises: InvalidDataError, naming the first bad rows."""
    name = display_name or path.name
    good: list[T] = []
    bad: list[BadRow] = []
    for row in load_rows(path, name):
        try:
            good.append(read(row.value, f"row {row.number} of {name}"))
        except RowError as error:
            bad.append(BadRow(row=row.number, field=error.field, reason=error.reason))
    if bad:
        raise InvalidDataError(_bad_rows_message(name, len(good) + len(bad), bad))
    return good


def conversation_key(messages: Sequence[Message]) -> bytes:
    """Equal for conversations that say the same; 16 bytes, so that a million of them fit in memory."""
    said: list[Any] = []
    for message in messages:
        said += (message["role"], message["content"].strip(), message.get("tool_calls"))
    return blake2b(orjson.dumps(said), digest_size=16).digest()


def _bad_rows_message(name: str, rows: int, bad: Sequence[BadRow]) -> str:
    shown = "; ".join(map(str, bad[:SHOWN_BAD_ROWS]))
    more = f"; and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    return f"{name}: {len(bad)} of {rows} rows cannot be used: {shown}{more}. Correct or remove them."
