"""Server-sent events as they come in, in any chunking.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

_EMPTY_LINE = re.compile(rb"\n\r?\n")
# Inside a text of the model's the quotes would be escaped.
_END = re.compile(rb'^data:\s*\[DONE\]|"finish_reason"\s*:\s*"[^"]|"error"\s*:\s*[{"]', re.MULTILINE)


@dataclass(slots=True)
class EventSplitter:
    """Whole events, as half of one would spoil whatever is sent after it."""

    _rest: bytes = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that this chunk completes, each with the empty line that ends it."""
        content = self._rest + chunk
        # An empty line may have begun in what was searched before, but not ended there.
        ends = [found.end() for found in _EMPTY_LINE.finditer(content, max(0, len(self._rest) - 2))]
        events = [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        self._rest = content[ends[-1] :] if ends else content
        return events

    def close(self) -> list[bytes]:
        """The last event where only its empty line is missing; none where it was cut short."""
        rest, self._rest = self._rest, b""
        return [rest] if _is_whole(data_of(rest)) else []


def ends_answer(event: bytes) -> bool:
    """Whether an answer that stops after this event is whole, or said to have failed."""
    return _END.search(event) is not None


def data_of(event: bytes) -> bytes | None:
    """What an event says; None where it has no data, as a comment."""
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _is_whole(data: bytes | None) -> bool:
    if data is None or data == b"[DONE]":
        return data is not None
    try:
        json.loads(data)
    except ValueError:
        return False
    return True
