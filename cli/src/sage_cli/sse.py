"""Reads the server-sent events of a streamed chat answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import ValidationError

from sage_contracts.errors import ErrorBody, UpstreamError, from_body


@dataclass(frozen=True)
class Waiting:
    """What the server or the model is doing before the first word."""

    text: str


@dataclass(frozen=True)
class Piece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end, with why the model stopped where the server says so."""

    reason: str | None = None


ChatItem = Waiting | Piece | Finished

# Comments that only keep proxies from closing the line.
_SILENT_COMMENTS = frozenset({"", "ping", "keep-alive", "keepalive"})

# What servers call a model's thoughts, which OpenAI's dialect has no field for.
_THOUGHTS = ("reasoning", "reasoning_content")


def lines_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a stream, which end with LF, or CR and LF, and with nothing else that Unicode has."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").removesuffix("\r")
    if rest:
        yield rest.decode(errors="replace")


def read_chat(lines: Iterable[str]) -> Iterator[ChatItem]:
    """The items of one streamed completion. Raises: SageError sent inside the stream; UpstreamError."""
    reason: str | None = None
    has_begun = False
    for data in _read_events(lines):
        if isinstance(data, Waiting):
            yield data
            continue
        if data == "[DONE]":
            yield Finished(reason)
            return
        chunk = _parse(data)
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            if text := delta.get("content"):
                has_begun = True
                yield Piece(text)
            elif not has_begun and any(delta.get(name) for name in _THOUGHTS):
                yield Waiting("thinking")
            reason = choice.get("finish_reason") or reason
    if reason is None:
        raise UpstreamError("The answer broke off: the connection ended before the model did.")
    yield Finished(reason)


def _read_events(lines: Iterable[str]) -> Iterator[Waiting | str]:
    """Comments as they come, but for those that say nothing, and the data of each event."""
    data: list[str] = []
    for line in chain(lines, [""]):  # the last event may lack its empty line
        if line.startswith(":"):
            comment = line[1:].strip()
            if comment not in _SILENT_COMMENTS:
                yield Waiting(comment)
        elif line.startswith("data:"):
            data.append(line[5:].strip())
        elif not line and data:
            yield "\n".join(data)
            data = []


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise UpstreamError(f"The stream carried an event that is no JSON: {data[:200]}") from None
    if not isinstance(chunk, dict):
        raise UpstreamError(f"The stream carried an event that is no object: {data[:200]}")
    if chunk.get("error"):
        try:
            raise from_body(ErrorBody.model_validate(chunk))
        except ValidationError:
            raise UpstreamError(f"The server reported an error: {chunk['error']}") from None
    return chunk
