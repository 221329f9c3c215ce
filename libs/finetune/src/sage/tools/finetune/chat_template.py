"""A tokenizer's own chat template: conversations as text, with the characters that carry loss.

Loss falls on what the assistant says and on the token that ends its turn, and on nothing else. Where a turn
begins and ends is found by rendering prefixes of the conversation, so any template works, with or without
`{% generation %}` markers. A template that has them narrows the loss to what it marks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from sage.tools.finetune.data import Conversation, Message
from sage.tools.finetune.data.conversation import (
    CALLS_LEFT_OUT,
    THOUGHTS_LEFT_OUT,
    functions_called,
    other_spellings,
    thoughts_in,
)
from sage_contracts.errors import InvalidDataError

Span = tuple[int, int]
"""Characters of a text, the end exclusive."""

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "Xq7probeZk"  # no template rewrites it, and no conversation holds it


@dataclass(frozen=True, slots=True)
class RenderedText:
    """The template's text for a conversation, cut after its last learned turn."""

    text: str
    learned: list[Span]
    """What carries loss, in order."""
    turn_ends: list[Span]
    """The token that ends each learned turn; always within `learned`."""
    origin: str


@dataclass(frozen=True, slots=True)
class _Tail:
    """What the template writes after an assistant's words, and where in it the end-of-turn token stands."""

    text: str
    end: Span


class UnlearnableRowError(InvalidDataError):
    """A conversation that the base model cannot learn from."""

    reason = ""
    """The same without the row's name."""


class ChatTemplate:
    """Raises: InvalidDataError when the tokenizer has no template."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise InvalidDataError(
                "The base model's tokenizer has no chat template, so conversations cannot be rendered. "
                "Choose an instruction-tuned base model (their names usually end in -Instruct)."
            )
        self._tokenizer = tokenizer
        added = sorted((t for t in tokenizer.get_added_vocab() if t.strip()), key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._tails: list[_Tail] = []

    @property
    def sha256(self) -> str:
        return sha256(str(self._tokenizer.chat_template).encode()).hexdigest()

    @property
    def end_tokens(self) -> list[str]:
        """What ends an assistant's words, in the turns that were rendered so far."""
        return list(dict.fromkeys(tail.text[slice(*tail.end)] for tail in self._tails))

    def rendered(self, conversation: Conversation) -> list[RenderedText]:
        """One text with all learned turns; one more for each turn that the template shows differently later.

        Each text is what `apply_chat_template(messages[: k + 1])` gives, for its last learned turn k, up to
        and with the token that ends that turn. Calls are spelt as the template wants them.
        Raises: InvalidDataError naming the row.
        """
        try:
            return _Row(self, conversation, conversation.messages).rendered()
        except UnlearnableRowError:
            for messages in other_spellings(conversation.messages):
                with suppress(UnlearnableRowError):
                    return _Row(
                        self, replace(conversation, messages=messages), conversation.messages
                    ).rendered()
            raise

    def text(self, row: Conversation, upto: int, *, add_generation_prompt: bool = False) -> str:
        """The template's text for the first `upto` messages."""
        turns = [_for_template(message) for message in row.messages[:upto]]
        return self._apply(turns, row, add_generation_prompt=add_generation_prompt)

    def _apply(self, turns: list[dict[str, Any]], row: Conversation, **options: Any) -> str:
        try:
            text = self._tokenizer.apply_chat_template(turns, tools=row.tools, tokenize=False, **options)
        except Exception as error:  # a template raises what its author liked
            raise refused(row.origin, f"the chat template refuses it ({error})") from error
        return str(text)

    def marked(self, row: Conversation, upto: int) -> list[Span] | None:
        """What the template's generation markers enclose; None for a template without them."""
        template = self._tokenizer.get_chat_template(tools=row.tools)
        if not _MARKERS.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[[_for_template(message) for message in row.messages[:upto]]],
            tools=row.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(start, end) for start, end in spans[0]]

    def probed(self, row: Conversation, turn: int) -> str:
        """The template's text up to the turn, with known words in its place."""
        probe = {"role": "assistant", "content": _PROBE}
        return self._apply([*map(_for_template, row.messages[:turn]), probe], row)

    def turn_end(self, row: Conversation, turn: int, upto: str, start: int) -> Span:
        """Where the token stands that ends the last turn of `upto`, whose words begin at `start`."""
        tail = self._known_tail(upto, start)
        if tail is None:
            found = self._probed_tail(row, turn)
            if found not in self._tails:
                self._tails.append(found)
            tail = self._known_tail(upto, start)
        if tail is not None:
            at = len(upto) - len(tail.text)
            return at + tail.end[0], at + tail.end[1]
        # Calls of tools may end differently from words: with the last token of their text.
        for found_token in reversed(list(self._added_token.finditer(upto, start))):
            if not upto[found_token.end() :].strip():
                return found_token.span()
        raise self._endless(row)

    def _known_tail(self, upto: str, start: int) -> _Tail | None:
        fitting = [t for t in self._tails if upto.endswith(t.text) and len(upto) - len(t.text) >= start]
        return max(fitting, key=lambda tail: len(tail.text), default=None)

    def _probed_tail(self, row: Conversation, turn: int) -> _Tail:
        """What follows the known words is the template's own."""
        _, found, tail = self.probed(row, turn).rpartition(_PROBE)
        if not found:
            raise refused(row.origin, "the chat template does not repeat the assistant's text as it is")
        end = self._added_token.search(tail)
        if end is None or tail[: end.start()].strip():
            raise self._endless(row)
        return _Tail(tail, end.span())

    @staticmethod
    def _endless(row: Conversation) -> InvalidDataError:
        return refused(
            row.origin,
            "the chat template ends the assistant's turn without a special token, so that the model "
            "would never learn to stop; choose a base model with a complete chat template",
        )


class _Row:
    """One conversation on its way through the template."""

    def __init__(self, template: ChatTemplate, shown: Conversation, messages: Sequence[Message]) -> None:
        """`messages` are those of `shown` as they are spelt here."""
        self._template = template
        self._row = shown
        self._messages = messages

    def rendered(self) -> list[RenderedText]:
        messages = self._messages
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        if not turns:
            return []
        whole = self._template.text(self._row, turns[-1] + 1)
        shared: list[tuple[Span, Span]] = []
        alone: list[RenderedText] = []
        for turn in turns:
            upto = whole if turn == turns[-1] else self._template.text(self._row, turn + 1)
            start = self._turn_start(turn, upto)
            end = self._template.turn_end(self._row, turn, upto, start)
            self._require_whole(messages[turn], upto[start : end[0]])
            if whole.startswith(upto[: end[1]]):
                shared.append(((start, end[1]), end))
            else:
                # The template shows this turn differently once others follow (thoughts removed, say):
                # learn it as it is seen when it is the last.
                alone.append(self._text(upto, turn, [((start, end[1]), end)]))
        return [self._text(whole, turns[-1], shared), *alone]

    def _require_whole(self, message: Message, learned: str) -> None:
        """Templates may re-space what is said, but what they leave out would be unlearned."""
        names = functions_called(message)
        if names and not any(name in learned for name in names):
            raise refused(self._row.origin, CALLS_LEFT_OUT)
        if not all(thought in learned for thought in thoughts_in(message)):
            raise refused(self._row.origin, THOUGHTS_LEFT_OUT)

    def _turn_start(self, turn: int, upto: str) -> int:
        asked = self._template.text(self._row, turn, add_generation_prompt=True)
        if upto.startswith(asked):
            return len(asked)
        # A generation prompt with something extra (an opened thought): learn from where they part. An answer
        # that happens to begin as the extra does (`<html>`, a call) parts later; known words do not.
        start = min(_common_prefix(asked, upto), _common_prefix(self._template.probed(self._row, turn), upto))
        if start < len(self._template.text(self._row, turn)):
            raise refused(self._row.origin, "the chat template changes its turns when an answer follows")
        return start

    def _text(self, text: str, turn: int, turns: Sequence[tuple[Span, Span]]) -> RenderedText:
        learned, ends = [span for span, _ in turns], [end for _, end in turns]
        marked = self._template.marked(self._row, turn + 1)
        if marked is not None:
            learned = _intersection(learned, marked)
            if any(not _covered(end, learned) for end in ends):
                raise refused(
                    self._row.origin,
                    "the chat template's {% generation %} markers leave out the token that ends the "
                    "assistant's turn, so that the model would never learn to stop; move {% endgeneration %} "
                    "behind that token, or take the markers out",
                )
        return RenderedText(text[: ends[-1][1]], learned, ends, self._row.origin)


def refused(origin: str, reason: str) -> UnlearnableRowError:
    error = UnlearnableRowError(f"The base model cannot learn from {origin}: {reason}.")
    error.reason = reason
    return error


def _for_template(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "weight"}


def _common_prefix(left: str, right: str) -> int:
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)


def _intersection(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    pairs = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return sorted((start, end) for start, end in pairs if start < end)


def _covered(span: Span, spans: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in spans)
