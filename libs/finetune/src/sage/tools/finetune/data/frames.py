"""Conversations as text in a model's chat template, fast: most run it once per sequence of roles only.

For counting only; what a model is trained on is rendered by the engine, from the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sage.tools.finetune.data.conversation import CALLS_LEFT_OUT, Message, functions_called

Span = tuple[int, int]
"""First character, and one past the last."""
Template = Callable[[Sequence[Any], Any], str]
"""(messages, tools) -> text. May raise."""

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

    A template that `is_choosy` may refuse a conversation for what is said in it: it is asked about each.
    """

    def __init__(self, template: Template = plain_frame, *, is_choosy: bool = False) -> None:
        self._template = template
        self._is_choosy = is_choosy
        self._frames: dict[tuple[str, ...], Frame | None] = {}
        self._shows_calls = {True, False} if template is plain_frame else set[bool]()
        """Whether rows had tools, of those where the template was seen to show a call."""
        self.refused = 0
        """Conversations rendered that the template refuses: those have the signs of ChatML."""
        self.first_refused = ""
        """Where the first of them comes from, and the template's reason."""

    def render(self, messages: Sequence[Message], tools: Any, origin: str = "") -> str:
        frame = self._frame_of(messages, tools)
        if frame is None:
            return self._render_whole(messages, tools, origin)
        parts: list[str] = []
        for (before, trim), message in zip(frame.slots, messages, strict=True):
            parts += (before, trim(message["content"]))
        return "".join([*parts, frame.end])

    def answers(self, text: str, messages: Sequence[Message]) -> list[Span]:
        """Where the assistant's words are in the text that `render` gave."""
        spans: list[Span] = []
        at = 0
        for message in messages:
            # Also without white space at its ends, which the template may have taken off.
            content = message["content"].strip()
            start = text.find(content, at)
            if start < 0:
                continue
            at = start + len(content)
            if message["role"] == "assistant" and message.get("weight", 1):
                spans.append((start, at))
        return spans

    def _frame_of(self, messages: Sequence[Message], tools: Any) -> Frame | None:
        if tools or self._is_choosy or _is_special(messages):
            return None
        roles = tuple([message["role"] for message in messages])
        if roles not in self._frames:
            if len(self._frames) >= _CACHED_SEQUENCES:
                self._frames.clear()
            self._frames[roles] = self._take_apart(roles)
        return self._frames[roles]

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

    def _render_whole(self, messages: Sequence[Message], tools: Any, origin: str) -> str:
        text: str | None = None
        try:
            text = self._template(messages, tools)
            self._require_calls(messages, tools)
        except Exception as error:
            self.refused += 1
            self.first_refused = self.first_refused or f"{origin} ({error})"
        return plain_frame(messages, tools) + str(tools or "") if text is None else text

    def _require_calls(self, messages: Sequence[Message], tools: Any) -> None:
        """A template that showed one row's calls shows those of the next as well."""
        for turn, message in enumerate(messages):
            if bool(tools) in self._shows_calls:
                return
            names = functions_called(message)
            if not names:
                continue
            before, upto = self._template(messages[:turn], tools), self._template(messages[: turn + 1], tools)
            if not any(upto.count(name) > before.count(name) for name in names):
                raise ValueError(CALLS_LEFT_OUT)
            self._shows_calls.add(bool(tools))


def _is_special(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in m or "tool_call_id" in m or "name" in m for m in messages)
