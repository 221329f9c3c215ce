"""Conversations as text in a model's chat template, fast: the template runs once per sequence of roles.

For counting only; what a model is trained on is rendered by the engine, from the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sage.tools.finetune.data.conversation import Message

Span = tuple[int, int]
"""First character, and one past the last."""
Template = Callable[[Sequence[Any], Any], str]
"""(messages, tools) -> text. May raise."""

_CACHED_SEQUENCES = 4096


def plain_frame(messages: Sequence[Any], tools: Any) -> str:
    """The signs of ChatML around every turn, for when there is no template."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


class Frames:
    """Renders by putting contents between the pieces that the template puts around them."""

    def __init__(self, template: Template = plain_frame) -> None:
        self._template = template
        self._pieces: dict[tuple[str, ...], list[str] | None] = {}
        marked = template([{"role": "user", "content": " x "}], None)
        self._is_stripped = " x " not in marked

    def render(self, messages: Sequence[Message], tools: Any) -> str:
        pieces = None if tools or _is_special(messages) else self._pieces_of(messages)
        if pieces is None:
            return self._render_whole(messages, tools)
        parts = [pieces[0]]
        for message, piece in zip(messages, pieces[1:], strict=True):
            parts += (self._content(message), piece)
        return "".join(parts)

    def answers(self, messages: Sequence[Message], tools: Any) -> list[Span]:
        """Where the assistant's words are in what `render` gives."""
        text = self.render(messages, tools)
        spans: list[Span] = []
        at = 0
        for message in messages:
            content = self._content(message)
            start = text.find(content, at)
            if start < 0:
                continue
            at = start + len(content)
            if message["role"] == "assistant" and message.get("weight", 1):
                spans.append((start, at))
        return spans

    def _content(self, message: Message) -> str:
        return message["content"].strip() if self._is_stripped else message["content"]

    def _pieces_of(self, messages: Sequence[Message]) -> list[str] | None:
        roles = tuple([message["role"] for message in messages])
        if roles not in self._pieces:
            if len(self._pieces) >= _CACHED_SEQUENCES:
                self._pieces.clear()
            self._pieces[roles] = self._split(roles)
        return self._pieces[roles]

    def _split(self, roles: Sequence[str]) -> list[str] | None:
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rest = self._template(turns, None)
        except Exception:  # a template raises what its author liked
            return None
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                return None
            pieces.append(piece)
        return [*pieces, rest] if "\ue000" not in "".join([*pieces, rest]) else None

    def _render_whole(self, messages: Sequence[Message], tools: Any) -> str:
        try:
            return self._template(messages, tools)
        except Exception:
            return plain_frame(messages, tools) + str(tools or "")


def _is_special(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in m or "tool_call_id" in m or "name" in m for m in messages)
