"""OpenAI's chat objects and server-sent events, for backends that do not get them ready-made.

Source: OpenAI API reference, "Chat completions" and "Streaming"; WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from sage_contracts.errors import ErrorBody

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def error_event(body: ErrorBody) -> bytes:
    """An error inside a stream, as the official SDK recognises it.

    The empty line in front ends an event that came without one.
    """
    return b"\n\n" + event(body.model_dump())


def to_json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True, slots=True)
class Completion:
    """The identity that all objects of one answer share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, counted: dict[str, int]) -> bytes:
        """The last event before DONE, for clients that asked for it."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": counted})

    def whole(
        self,
        message: dict[str, Any],
        finish_reason: str,
        counted: dict[str, int],
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        """The answer in one piece."""
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
        return to_json({**self._head("chat.completion"), "choices": [choice], "usage": counted})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
