"""Keys that are equal for rows which say or teach the same, and how many are seen twice."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import orjson

from sage.tools.finetune.data.conversation import Message, RowError
from sage.tools.finetune.data.preferences import Tools


def conversation_key(messages: Sequence[Message]) -> bytes:
    """Equal for conversations that say the same, white space at the ends of turns aside; 16 bytes, so that a
    million of them fit in memory."""
    return _digest([_said([{**message, "content": message["content"].strip()} for message in messages])])


def row_key(messages: Sequence[Message], tools: Tools | None) -> bytes:
    """Equal for rows that teach the same: also by what is learned of them, and by the tools they offer."""
    return _digest([_said(messages), [message.get("weight", 1) for message in messages], tools])


def _said(messages: Sequence[Message]) -> list[Any]:
    said: list[Any] = []
    for message in messages:
        said += (message["role"], message["content"], message.get("tool_calls"))
        said += filter(None, [message.get("reasoning_content")])
    return said


def _digest(content: list[Any]) -> bytes:
    try:
        # Calls and tools of a Parquet file hold what JSON has not, such as decimals: there their text counts.
        written = orjson.dumps(content, default=str)
    except orjson.JSONEncodeError as error:
        raise RowError("row", f"holds what cannot be written as JSON ({error})") from error
    return blake2b(written, digest_size=16).digest()


class Duplicates:
    """Counts repeated keys in 8 bytes each, where a set would take a hundred."""

    def __init__(self) -> None:
        self._parts = [array("Q") for _ in range(256)]

    def add(self, key: bytes) -> None:
        self._parts[key[0]].append(int.from_bytes(key[1:9]))

    def count(self) -> int:
        return sum(len(part) - len(set(part)) for part in self._parts)
