"""Conversations as text in a model's chat template, fast: most run it once per sequence of roles only.

For counting only; what a model is trained on is rendered by the engine, from the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from typing import Any, NamedTuple

from sage.tools.finetune.data.conversation import Conversation, Message, other_spellings

Span = tuple[int, int]
"""First character, and one past the last."""
Template = Callable[[Sequence[Any], Any], str]
"""(messages, tools) -> text. May raise."""
Check = Callable[[Conversation], None]
"""Raises: RowError for a conversation that training refuses."""
Shape = tuple[tuple[str, int], ...]
"""Of every turn the role, and whether it is learned."""

_MORE_THAN_WORDS = frozenset({"tool_calls", "tool_call_id", "name", "reasoning_content"})
_CACHED_SEQUENCES = 4096
_PAD = "\u2003"
"""White space that no template has of its own: what is left of it tells which ends are trimmed."""
_TRIMS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (True, False): str.rstrip,
    (False, True): str.lstrip,
    (False, False): str.strip,
}
"""By whether white space before and after a content is kept."""


def plain_frame(messages: Sequence[Any], tools: Any) -> str:
    """The signs of ChatML around every turn, for when there is no template."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


class Slot(NamedTuple):
    """Where a turn's content goes: what the template puts before it, and what it takes off its ends."""

    before: str
    trim: Callable[[str], str]


class Frame(NamedTuple):
    slots: list[Slot]
    end: str


class Frames:
    """Renders by putting contents between the pieces that the template puts around them.

    A template that `is_choosy` may refuse a conversation for what is said in it: it is asked about each; and
    about those that hold a text which is `looked_for`, since it may make something else of them.
    """

    def __init__(
        self,
        template: Template = plain_frame,
        check: Check | None = None,
        *,
        is_choosy: bool = False,
        looked_for: Collection[str] = (),
    ) -> None:
        self._template = template
        self._check = check
        self._is_choosy = is_choosy
        self._looked_for = looked_for
        self._passed: set[Shape] = set()
        self._frames: dict[tuple[str, ...], Frame | None] = {}

    def check(self, row: Conversation) -> None:
        """Raises: RowError where training would refuse the conversation.

        One that differs from another that passed in words alone passes too, where words cannot matter.
        """
        if self._check is None:
            return
        shape = tuple([(message["role"], message.get("weight", 1)) for message in row.messages])
        if shape in self._passed and self._frame_of(row.messages, row.tools) is not None:
            return
        self._check(row)
        if len(self._passed) >= _CACHED_SEQUENCES:
            self._passed.clear()
        self._passed.add(shape)

    def render(self, messages: Sequence[Message], tools: Any) -> str:
        """The template's text; with the signs of ChatML where the template refuses the conversation."""
        frame = self._frame_of(messages, tools)
        return self._render_whole(messages, tools) if frame is None else "".join(_pieces(frame, messages))

    def answers(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """Where the assistant's words are in the text that `render` gave, without white space at their ends.

        Exact where the template only puts something around contents, looked for otherwise.
        """
        frame = self._frame_with([message["role"] for message in messages])
        pieces = _pieces(frame, messages) if frame else []
        if "".join(pieces) != text:
            return _looked_up(text, messages)
        ends = list(accumulate(map(len, pieces)))[1::2]
        return [
            (end - len(said.lstrip()), end - len(said) + len(said.rstrip()))
            for message, said, end in zip(messages, pieces[1::2], ends, strict=False)
            if _is_learned(message) and said.strip()
        ]

    def _frame_of(self, messages: Sequence[Message], tools: Any) -> Frame | None:
        if tools or self._is_choosy or self._is_special(messages):
            return None
        return self._frame_with([message["role"] for message in messages])

    def _frame_with(self, roles: Sequence[str]) -> Frame | None:
        key = tuple(roles)
        if key not in self._frames:
            if len(self._frames) >= _CACHED_SEQUENCES:
                self._frames.clear()
            self._frames[key] = self._take_apart(roles)
        return self._frames[key]

    def _is_special(self, messages: Sequence[Message]) -> bool:
        return any(
            not m.keys().isdisjoint(_MORE_THAN_WORDS)
            or any(text in m["content"] for text in self._looked_for)
            for m in messages
        )

    def _take_apart(self, roles: Sequence[str]) -> Frame | None:
        """None where the template does something else with contents than to put them somewhere."""
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        turns = [{"role": r, "content": f"{_PAD}{mark}{_PAD}"} for r, mark in zip(roles, marks, strict=True)]
        try:
            rest = self._template(turns, None)
        except Exception:  # a template raises what its author liked
            return None
        slots = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            trim = _TRIMS[before.endswith(_PAD), rest.startswith(_PAD)]
            slots.append(Slot(before.removesuffix(_PAD), trim))
            rest = rest.removeprefix(_PAD)
        is_plain = "\ue000" not in rest and not any("\ue000" in slot.before for slot in slots)
        return Frame(slots, rest) if is_plain else None

    def _render_whole(self, messages: Sequence[Message], tools: Any) -> str:
        for spelt in chain([messages], other_spellings(messages)):
            with suppress(Exception):  # a template raises what its author liked
                return self._template(spelt, tools)
        return plain_frame(messages, tools) + str(tools or "")


def _pieces(frame: Frame, messages: Sequence[Message]) -> list[str]:
    """What is before each content, the content, and the end of all."""
    pieces: list[str] = []
    for (before, trim), message in zip(frame.slots, messages, strict=True):
        pieces += (before, trim(message["content"]))
    return [*pieces, frame.end]


def _looked_up(text: str, messages: Sequence[Message]) -> list[Span]:
    """The answers where their words are first found after those of the turn before."""
    spans: list[Span] = []
    at = 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, at)
        if start < 0:
            continue
        at = start + len(content)
        if _is_learned(message):
            spans.append((start, at))
    return spans


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))
