"""How many tokens the rows have, and what `max_length` would cut off. No torch, no transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.frames import Frames, LearnedText, Span, plain_texts
from sage.tools.finetune.data.text_batch import TextBatch

_HISTOGRAM_BARS = 12


class Bar(BaseModel):
    """Rows of at least `least` and at most `most` tokens."""

    model_config = ConfigDict(extra="forbid")

    least: int
    most: int
    rows: int


class TokenReport(BaseModel):
    """Of rows as training has them: more than one of a conversation where the template rewrites turns."""

    model_config = ConfigDict(extra="forbid")

    tokenizer: str
    is_estimate: bool
    """Whether no tokenizer was at hand, and the numbers are from the length of the text."""
    total: int
    mean: float
    median: int
    p95: int
    longest: int
    max_length: int
    too_long: int
    """Rows of more than `max_length` tokens."""
    answer_tokens_cut: int
    """Tokens with loss that lie beyond it: of answers, and those that end their turns."""
    answers_cut_off: int
    """Conversations whose whole answer lies beyond it: nothing of them would be learned."""
    histogram: list[Bar]
    positions: int | None = None
    """What the chosen model was made for, where it says so."""


class TokenCounter(Protocol):
    """Counts the tokens of rendered conversations."""

    name: str
    is_estimate: bool

    def count(self, texts: Sequence[str]) -> list[int]: ...

    def learned(self, text: str, spans: Sequence[Span]) -> list[range]:
        """The places among the text's tokens of those that carry loss, by the characters that do."""


class _Waiting(NamedTuple):
    found: LearnedText
    is_last: bool
    """Of its conversation's."""


class LengthCounter:
    """Measures conversations in batches, keeping only how many had which length.

    Where a person chose the model, a row that it cannot learn from is a bad one. Otherwise such rows are only
    counted: the run may be of another model.
    """

    def __init__(
        self,
        counter: TokenCounter,
        frames: Frames,
        max_length: int,
        *,
        is_model_chosen: bool = True,
        positions: int | None = None,
    ) -> None:
        self._positions = positions
        self._is_model_chosen = is_model_chosen
        self.refused = 0
        """Rows that a model which nobody chose cannot learn from."""
        self._first_refused = ""
        self._counter = counter
        self._frames = frames
        self._max_length = max_length
        self._waiting = TextBatch[_Waiting]()
        self._lengths: Counter[int] = Counter()
        self._answer_tokens_cut = 0
        self._answers_cut_off = 0
        self._is_anything_kept = False
        """Of the conversation that is measured."""

    def add(
        self, messages: list[Message], tools: Any, origin: str = "", other: list[Message] | None = None
    ) -> None:
        """`origin` is for what is said of the row; `other` is only shown to the template.

        Raises: RowError for a row that the chosen model cannot learn from, which is then not measured.
        """
        try:
            shown = (messages,) if other is None else (messages, other)
            texts, *_ = [self._frames.texts(Conversation(turns, origin, tools)) for turns in shown]
        except RowError as error:
            if self._is_model_chosen:
                raise
            self.refused += 1
            self._first_refused = self._first_refused or f"{origin} {error.reason}"
            texts = plain_texts(Conversation(messages, origin, tools))
        for number, found in enumerate(texts, 1):
            self._waiting.add(_Waiting(found, number == len(texts)), found.text)
            if self._waiting.is_full:
                self._measure()

    def report(self) -> TokenReport | None:
        """None when there were no rows."""
        self._measure()
        rows = self._lengths.total()
        if not rows:
            return None
        ordered = sorted(self._lengths.items())
        total = sum(length * count for length, count in ordered)
        return TokenReport(
            tokenizer=self._counter.name,
            is_estimate=self._counter.is_estimate,
            total=total,
            mean=round(total / rows, 1),
            median=_quantile(ordered, rows, 0.5),
            p95=_quantile(ordered, rows, 0.95),
            longest=ordered[-1][0],
            max_length=self._max_length,
            too_long=sum(count for length, count in ordered if length > self._max_length),
            answer_tokens_cut=self._answer_tokens_cut,
            answers_cut_off=self._answers_cut_off,
            histogram=_histogram(ordered, self._max_length),
            positions=self._positions,
        )

    def notes(self) -> list[str]:
        """What a person should know about the rows beside their lengths."""
        if not self.refused:
            return []
        rows = "1 row" if self.refused == 1 else f"{self.refused:,} rows"
        return [f"training {self._counter.name} would stop at {rows}: {self._first_refused}"]

    def _measure(self) -> None:
        waiting = self._waiting.take()
        lengths = self._counter.count([found.text for found, _ in waiting])
        for (found, is_last), length in zip(waiting, lengths, strict=True):
            self._is_anything_kept |= self._is_kept(found, length)
            if is_last:
                self._answers_cut_off += not self._is_anything_kept
                self._is_anything_kept = False

    def _is_kept(self, found: LearnedText, length: int) -> bool:
        """Whether anything is left to learn of the text when it is cut."""
        self._lengths[length] += 1
        if length <= self._max_length:
            return True
        learned = self._counter.learned(found.text, found.learned)
        self._answer_tokens_cut += sum(max(0, at.stop - max(at.start, self._max_length)) for at in learned)
        # The first token is nobody's successor, so it can carry no loss.
        return any(max(at.start, 1) < min(at.stop, self._max_length) for at in learned)


def _quantile(ordered: Sequence[tuple[int, int]], rows: int, share: float) -> int:
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= share * rows:
            return length
    return ordered[-1][0]


def _histogram(ordered: Sequence[tuple[int, int]], max_length: int) -> list[Bar]:
    """Bars of equal width from the shortest to the 99th percentile, the last also for the rest; where rows
    are longer than `max_length`, one ends there."""
    shortest, longest = ordered[0][0], ordered[-1][0]
    end = max(_quantile(ordered, sum(count for _, count in ordered), 0.99), 1)
    width = 1
    while (end - 1) // width - (shortest - 1) // width >= _HISTOGRAM_BARS:
        width *= 2
    if longest > max_length and max_length % width:
        width = next((w for w in range(width, 2 * width) if max_length % w == 0), width)
    first = max(shortest - 1, 0) // width
    last = max(end - 1, 0) // width
    counts: Counter[int] = Counter()
    for length, count in ordered:
        counts[min(max(length - 1, 0) // width, last)] += count
    bars = [Bar(least=i * width + 1, most=(i + 1) * width, rows=counts[i]) for i in range(first, last + 1)]
    bars[-1].most = max(bars[-1].most, longest)
    return bars
