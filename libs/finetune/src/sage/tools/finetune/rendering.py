"""Conversations as token ids with labels, through the model's own chat template.

Loss falls on what the assistant says and on the token that ends its turn, and on nothing else. Where a turn
begins and ends is found by rendering prefixes of the conversation, so any template works, with or without
generation markers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sage.tools.finetune.data import Conversation, Message
from sage.tools.finetune.head_loss import IGNORED
from sage_contracts.errors import InvalidDataError

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and labels of equal length; labels are ids, or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def label_count(self) -> int:
        # The first token is nobody's successor, so it can carry no loss.
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class RenderStats:
    truncated: int = 0
    """Rows cut at max_length."""
    dropped: int = 0
    """Rows whose answer began beyond max_length."""


class ChatRenderer:
    """Renders conversations for one tokenizer. Raises InvalidDataError when that has no chat template."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not tokenizer.chat_template:
            raise InvalidDataError(
                "The base model's tokenizer has no chat template, so conversations cannot be rendered. "
                "Choose an instruction-tuned base model (their names usually end in -Instruct)."
            )
        self._tokenizer = tokenizer
        self._max_length = max_length
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._turn_end = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self.stats = RenderStats()

    @property
    def template_hash(self) -> str:
        template = self._tokenizer.chat_template
        return sha256(str(template).encode()).hexdigest()

    def samples(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """One sample per conversation; one per assistant turn where the template rewrites earlier turns.

        Raises: InvalidDataError naming the row that the template cannot render.
        """
        texts: list[str] = []
        spans: list[list[Span]] = []
        for conversation in conversations:
            for text, labelled in self._rendered(conversation.messages, conversation.origin):
                texts.append(text)
                spans.append(labelled)
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        found = (self._sample(ids, offsets, labelled) for ids, offsets, labelled in rows)
        return [sample for sample in found if sample is not None]

    def _sample(self, ids: list[int], offsets: list[Span], spans: list[Span]) -> Sample | None:
        labels = [
            token if any(start <= left and right <= end for start, end in spans) else IGNORED
            for token, (left, right) in zip(ids, offsets, strict=True)
        ]
        if len(ids) > self._max_length:
            self.stats.truncated += 1
            ids, labels = ids[: self._max_length], labels[: self._max_length]
        sample = Sample(ids, labels)
        if sample.label_count == 0:
            self.stats.dropped += 1
            return None
        return sample

    def _rendered(self, messages: Sequence[Message], origin: str) -> list[tuple[str, list[Span]]]:
        """[(text, character spans that carry loss)], the text cut after its last span."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        whole = self._text(messages, origin)
        shared: list[Span] = []
        alone: list[tuple[str, list[Span]]] = []
        for turn in turns:
            upto, span = self._turn_span(messages, turn, origin)
            if whole.startswith(upto):
                shared.append(span)
            else:
                # The template shows this turn differently once others follow (thoughts removed, say):
                # learn it as it is seen when it is the last.
                alone.append((upto, [span]))
        return ([(whole[: shared[-1][1]], shared)] if shared else []) + alone

    def _turn_span(self, messages: Sequence[Message], turn: int, origin: str) -> tuple[str, Span]:
        """The text up to the end of an assistant's turn, and the span of it that carries loss."""
        asked = self._text(messages[:turn], origin, add_generation_prompt=True)
        upto = self._text(messages[: turn + 1], origin)
        start = len(asked)
        if not upto.startswith(asked):
            # A generation prompt with something extra (an opened thought): learn from where they part.
            start = _common_prefix(asked, upto)
            if start < len(self._text(messages[:turn], origin)):
                raise _refused(origin, "the chat template changes its turns when an answer follows")
        answer = messages[turn]["content"].strip()
        at = upto.find(answer, start)
        if at < 0:
            raise _refused(origin, "the chat template does not repeat the assistant's text as it is")
        end = self._turn_end.search(upto, at + len(answer))
        if end is None or upto[at + len(answer) : end.start()].strip():
            raise _refused(
                origin,
                "the chat template ends the assistant's turn without a special token, so that the model "
                "would never learn to stop; choose a base model with a complete chat template",
            )
        return upto[: end.end()], (start, end.end())

    def _text(self, messages: Sequence[Message], origin: str, *, add_generation_prompt: bool = False) -> str:
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # a template raises what its author liked
            raise _refused(origin, f"the chat template refuses it ({error})") from error


def _refused(origin: str, reason: str) -> InvalidDataError:
    return InvalidDataError(f"The base model cannot learn from {origin}: {reason}.")


def _common_prefix(left: str, right: str) -> int:
    shorter = min(len(left), len(right))
    return next((i for i in range(shorter) if left[i] != right[i]), shorter)
