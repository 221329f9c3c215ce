"""Rows whose contents hold the marks that the model's chat template writes around turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sage.tools.finetune.data.conversation import Message

_ASKED, _SAID = "Xq7askedZk", "Xq7saidZk"  # no template rewrites them


def turn_marks(apply: Callable[[list[dict[str, Any]]], str], added: Collection[str]) -> list[str]:
    """The added tokens that begin the user's turn and end the assistant's.

    `apply` gives the template's text. None where it refuses a question with its answer. What it puts before
    an answer is left out: thoughts begin so, which contents may have.
    """
    turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
    try:
        before, _, rest = apply(turns).partition(_ASKED)
    except Exception:  # a template raises what its author liked
        return []
    _, is_found, after = rest.partition(_SAID)
    # White space and words are tokens of their own, too.
    marks = sorted((t for t in added if len(t.strip()) > 2 and not t.isalnum()), key=len, reverse=True)
    if not is_found or not marks:
        return []
    return list(dict.fromkeys(re.findall("|".join(map(re.escape, marks)), f"{before}\n{after}")))


class MarkedRows:
    """Counts rows, one after another, that hold any of the marks."""

    def __init__(self, marks: Collection[str] = ()) -> None:
        self._marks = tuple(marks)
        self._count = 0
        self._first = ""
        self._last: str | None = None

    def add(self, messages: Sequence[Message], origin: str) -> None:
        """A row may come in several conversations, which count once."""
        if origin == self._last:
            return
        for mark in self._marks:
            if any(mark in message["content"] for message in messages):
                self._count += 1
                self._first = self._first or f"{origin} holds {mark}"
                self._last = origin
                return

    def note(self) -> str:
        """What a person should know of them; empty where there are none."""
        if not self._count:
            return ""
        rows = "1 row has" if self._count == 1 else f"{self._count:,} rows have"
        return (
            f"{rows} marks in the text that the chat template writes itself around turns: {self._first}. The "
            "model would learn to write them twice, or the user's turns too. Give the turns as messages, not "
            "as text that is rendered already, and take marks off the ends of answers"
        )
