"""How many tokens the rows have, and what `max_length` would cut off. No torch, no transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.frames import Frames, Span
from sage.tools.finetune.data.text_batch import TextBatch

_HISTOGRAM_BARS = 12


class Bar(BaseModel):
    """Rows of at least `least` and at most `most` tokens."""

    model_config = ConfigDict(extra="forbid")

    least: int
    most: int
    rows: int


class TokenReport(BaseModel):
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
    """Tokens of answers that lie beyond it."""
    answers_cut_off: int
    """Rows whose whole answer lies beyond it: nothing of them would be learned."""
    histogram: list[Bar]
    positions: int | None = None
    """What the chosen model was made for, where it says so."""


class TokenCounter(Protocol):
    """Counts the tokens of rendered conversations."""

    name: str
    is_estimate: bool

    def count(self, texts: Sequence[str]) -> list[int]: ...

    def ends(self, text: str) -> list[int]:
        """Where in the text each token ends, in characters."""


class _Waiting(NamedTuple):
    text: str
    messages: Sequence[Message]


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

    def add(
        self, messages: list[Message], tools: Any, origin: str = "", other: list[Message] | None = None
    ) -> None:
        """`origin` is for what is said of the row; `other` is only shown to the template.

        Raises: RowError for a row that the chosen model cannot learn from, which is then not measured.
        """
        try:
            for turns in (messages,) if other is None else (messages, other):
                self._frames.check(Conversation(turns, origin, tools))
        except RowError as error:
            if self._is_model_chosen:
                raise
            self.refused += 1
            self._first_refused = self._first_refused or f"{origin} {error.reason}"
        text = self._frames.render(messages, tools)
        self._waiting.add(_Waiting(text, messages), text)
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
        lengths = self._counter.count([text for text, _ in waiting])
        for (text, messages), length in zip(waiting, lengths, strict=True):
            self._lengths[length] += 1
            if length > self._max_length:
                self._note_cut(text, self._frames.answers(text, messages))

    def _note_cut(self, text: str, answers: Sequence[Span]) -> None:
        ends = self._counter.ends(text)
        kept_chars, cut = ends[self._max_length - 1], ends[self._max_length :]
        for start, end in answers:
            self._answer_tokens_cut += sum(max(start, kept_chars) < at <= end for at in cut)
        self._answers_cut_off += bool(answers) and answers[0][0] >= kept_chars


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
