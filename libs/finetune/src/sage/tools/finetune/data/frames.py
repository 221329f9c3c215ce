"""The texts that training makes of conversations, fast: most templates run once per sequence of roles only.

For counting only; what a model is trained on is rendered by the engine, from the tokenizer itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from sage.tools.finetune.data.conversation import Conversation, Message, RowError

Span = tuple[int, int]
"""First character, and one past the last."""
Shape = tuple[tuple[str, int], ...]
"""Of every turn the role, and whether it is learned."""

_MORE_THAN_WORDS = frozenset({"tool_calls", "tool_call_id", "name", "reasoning_content"})
_CACHED_SHAPES = 4096
_MOST_SLOTS = 1000
"""Longer conversations are rarely alike, and a text for each of their turns has the square of their turns."""
# White space that no template has of its own: where it is missing, that end of a content is trimmed.
_LEFT, _RIGHT = "\u2002", "\u2003"
_MARK = re.compile(f"{_LEFT}?\ue000([0-9]+)\ue001{_RIGHT}?")
_SIGNS = frozenset(f"{_LEFT}{_RIGHT}\ue000\ue001")
_TRIMS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (True, False): str.rstrip,
    (False, True): str.lstrip,
    (False, False): str.strip,
}
"""By whether white space before and after a content is kept."""


class LearnedText(NamedTuple):
    """What one row of training is: text up to the end of its last learned turn, and what carries loss."""

    text: str
    learned: list[Span]


Rendering = Callable[[Conversation], list[LearnedText]]
"""Raises: RowError for a conversation that training refuses."""


def plain_texts(row: Conversation) -> list[LearnedText]:
    """With the signs of ChatML around every turn, for when there is no template."""
    text, learned, end = str(row.tools or ""), [], 0
    for message in row.messages:
        text += f"<|im_start|>{message['role']}\n"
        start = len(text)
        text += f"{message['content']}<|im_end|>"
        if _is_learned(message):
            end = len(text)
            learned.append((start, end))
        text += "\n"
    return [LearnedText(text[:end], learned)] if learned else []


class _Slot(NamedTuple):
    """Where a turn's content goes: what the template puts before it, and what it takes off its ends."""

    before: str
    turn: int
    trim: Callable[[str], str]


_Place = tuple[int, int]
"""A piece, and a character of it. Pieces are what is before a content, the content, and so on."""


class _TextFrame(NamedTuple):
    """A text without the contents."""

    slots: list[_Slot]
    end: str
    learned: list[tuple[_Place, _Place]]

    def around(self, messages: Sequence[Message]) -> LearnedText:
        pieces: list[str] = []
        for before, turn, trim in self.slots:
            pieces += (before, trim(messages[turn]["content"]))
        pieces.append(self.end)
        starts = list(accumulate(map(len, pieces), initial=0))
        learned = [(starts[a] + at, starts[b] + upto) for (a, at), (b, upto) in self.learned]
        return LearnedText("".join(pieces), learned)


class _Frame(NamedTuple):
    """A conversation without the contents."""

    texts: list[_TextFrame]
    takes_spaces: bool
    """Whether it is right for contents that begin or end with white space, too."""


class Frames:
    """Renders by putting contents between the pieces that the template puts around them.

    A template that `is_choosy` may refuse a conversation for what is said in it: it is asked about each; and
    about those that hold a text which is `looked_for`, since it may make something else of them.
    """

    def __init__(
        self,
        rendering: Rendering = plain_texts,
        *,
        is_choosy: bool = False,
        looked_for: Collection[str] = (),
    ) -> None:
        self._rendering = rendering
        self._is_choosy = is_choosy
        self._looked_for = looked_for
        self._seen: set[int] = set()
        self._frames: dict[Shape, _Frame | None] = {}

    def texts(self, row: Conversation) -> list[LearnedText]:
        """What training makes of the conversation.

        Raises: RowError where training would refuse it. One that differs from another that passed in words
        alone passes too, where words cannot matter.
        """
        if row.tools or self._is_choosy or self._is_special(row.messages):
            return self._rendering(row)
        shape = tuple([(m["role"], int(_is_learned(m))) for m in row.messages])
        frame = self._frame_of(shape)
        if frame is None or not (frame.takes_spaces or all(map(_is_bare, row.messages))):
            return self._rendering(row)
        return [text.around(row.messages) for text in frame.texts]

    def _frame_of(self, shape: Shape) -> _Frame | None:
        if shape not in self._frames:
            if len(shape) > _MOST_SLOTS or not self._is_seen(shape):
                return None
            if len(self._frames) >= _CACHED_SHAPES:
                self._frames.clear()
            self._frames[shape] = self._take_apart(shape)
        return self._frames[shape]

    def _is_seen(self, shape: Shape) -> bool:
        """Whether it comes again: taking it apart costs more than rendering one conversation."""
        key = hash(shape)
        if key in self._seen:
            return True
        if len(self._seen) >= _CACHED_SHAPES:
            self._seen.clear()
        self._seen.add(key)
        return False

    def _is_special(self, messages: Sequence[Message]) -> bool:
        return any(
            not m.keys().isdisjoint(_MORE_THAN_WORDS)
            or not m["content"].strip()  # templates leave out what is empty
            or any(text in m["content"] for text in self._looked_for)
            for m in messages
        )

    def _take_apart(self, shape: Shape) -> _Frame | None:
        """None where the template does something else with contents than to put them somewhere."""
        bare = _marked(shape, "", "")
        # It may trim line breaks only, or make another text of contents that have nothing to trim.
        found = self._framed(_marked(shape, _LEFT, _RIGHT), bare, _marked(shape, "\n", " \n"))
        if found is not None:
            return _Frame(found, takes_spaces=True)
        found = self._framed(bare)
        return None if found is None else _Frame(found, takes_spaces=False)

    def _framed(self, marked: Conversation, *others: Conversation) -> list[_TextFrame] | None:
        """What is around the marks, where it is around the others' too."""
        frames: list[_TextFrame] = []
        try:
            for text in self._rendering(marked):
                frame = _taken_apart(text)
                if frame is None:
                    return None
                frames.append(frame)
            for row in others:
                if [frame.around(row.messages) for frame in frames] != self._rendering(row):
                    return None
        except RowError:
            return None
        return frames if sum(len(frame.slots) for frame in frames) <= _MOST_SLOTS else None


def _marked(shape: Shape, left: str, right: str) -> Conversation:
    messages: list[Message] = [
        {"role": role, "content": f"{left}\ue000{turn}\ue001{right}", "weight": weight}
        for turn, (role, weight) in enumerate(shape)
    ]
    return Conversation(messages, "a row")


def _taken_apart(found: LearnedText) -> _TextFrame | None:
    slots: list[_Slot] = []
    edges = [0]
    for mark in _MARK.finditer(found.text):
        trim = _TRIMS[mark[0].startswith(_LEFT), mark[0].endswith(_RIGHT)]
        slots.append(_Slot(found.text[edges[-1] : mark.start()], int(mark[1]), trim))
        edges += mark.span()
    end = found.text[edges[-1] :]
    learned = [(_place(edges, start), _place(edges, upto)) for start, upto in found.learned]
    is_plain = _SIGNS.isdisjoint("".join([*(slot.before for slot in slots), end]))
    # A content is at an odd place among the pieces; where learning begins or ends within one, words decide.
    are_around = not any(piece % 2 and at for span in learned for piece, at in span)
    return _TextFrame(slots, end, learned) if is_plain and are_around else None


def _place(edges: Sequence[int], at: int) -> _Place:
    """In the last piece that begins at `at` or before it."""
    piece = max(i for i, edge in enumerate(edges) if edge <= at)
    return piece, at - edges[piece]


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def _is_bare(message: Message) -> bool:
    return message["content"] == message["content"].strip()
