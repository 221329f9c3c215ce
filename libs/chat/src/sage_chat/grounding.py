"""Passages into a request, and citations out of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sage_chat.control_tokens import without_control_tokens
from sage_contracts.chat import Passage

CITATIONS_HEADER = "X-Sage-Citations"

# Many clients and proxies stop at 8 KiB of headers: this one names sources, it does not carry them.
_MAX_HEADER_CHARS = 4096
_SNIPPET_CHARS = 60

_INSTRUCTION = (
    "Answer from the numbered sources below and cite them by number, like [1]. "
    "If they do not contain the answer, say so."
)
_NOTHING = "No passage of the index matches the question. Say so if you answer from other knowledge."


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The last thing the user said, as text."""
    return next(questions_of(messages), "")


def questions_of(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the user said, as text, the last first."""
    return (
        text_of(message.get("content")) for message in reversed(messages) if message.get("role") == "user"
    )


def text_of(content: Any) -> str:
    """A message's content as text: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        return "\n".join(str(part.get("text", "")) for part in parts)
    return ""


def grounded(messages: Sequence[Mapping[str, Any]], passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """The messages with the passages in front."""
    return instructed(messages, sources_text(passages))


def instructed(messages: Sequence[Mapping[str, Any]], instruction: str) -> list[dict[str, Any]]:
    """The messages with an instruction in front, as (part of) the one system message.

    A second system message would be refused by many chat templates, so an existing one is extended.
    """
    rest = [dict(message) for message in messages]
    if rest and rest[0].get("role") in ("system", "developer"):
        own = rest[0].get("content")
        extended = (
            [{"type": "text", "text": instruction}, *own]
            if isinstance(own, list)
            else f"{instruction}\n\n{own or ''}".strip()
        )
        return [{**rest[0], "content": extended}, *rest[1:]]
    return [{"role": "system", "content": instruction}, *rest]


def fitting(passages: Sequence[Passage], max_bytes: int) -> list[Passage]:
    """The first passages whose texts fit in together, at least one: small models have small contexts.

    Bytes and not characters, because small vocabularies spell Chinese byte by byte.
    """
    taken: list[Passage] = []
    left_bytes = max_bytes
    for passage in passages:
        left_bytes -= len(passage.text.encode())
        if taken and left_bytes < 0:
            break
        taken.append(passage)
    return taken


def sources_text(passages: Sequence[Passage]) -> str:
    if not passages:
        return _NOTHING
    listed = "\n\n".join(f"[{passage.id}] {passage.source}\n{passage.text}" for passage in passages)
    return f"{_INSTRUCTION}\n\n{without_control_tokens(listed)}"


def citations_header(passages: Sequence[Passage]) -> str:
    """Passages as one line of ASCII JSON: id, source, score and the start of the text."""
    entries = [
        {
            "id": passage.id,
            "source": passage.source,
            "score": round(passage.score, 3),
            "text": " ".join(passage.text.split())[:_SNIPPET_CHARS],
        }
        for passage in passages
    ]
    encoded = json.dumps(entries, separators=(",", ":"))
    if len(encoded) > _MAX_HEADER_CHARS:
        encoded = json.dumps([{**entry, "text": ""} for entry in entries], separators=(",", ":"))
    while len(encoded) > _MAX_HEADER_CHARS and entries:
        entries.pop()
        encoded = json.dumps([{**entry, "text": ""} for entry in entries], separators=(",", ":"))
    return encoded
