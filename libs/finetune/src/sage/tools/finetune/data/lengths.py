"""How many tokens the rows have, and what `max_length` would cut off. No torch, no transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from sage.tools.finetune.data.conversation import Message
from sage.tools.finetune.data.frames import Frames, Span

_BATCH_ROWS = 512
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


class TokenCounter(Protocol):
    """Counts the tokens of rendered conversations."""

    name: str
    is_estimate: bool

    def count(self, texts: Sequence[str]) -> list[int]: ...

    def ends(self, text: str) -> list[int]:
        """Where in the text each token ends, in characters."""


class _Waiting(NamedTuple):
    messages: Sequence[Message]
    tools: Any
    origin: str
    other: Sequence[Message] | None


class LengthCounter:
    """Measures conversations in batches, keeping only how many had which length."""

    def __init__(self, counter: TokenCounter, frames: Frames, max_length: int) -> None:
        self._counter = counter
        self._frames = frames
        self._max_length = max_length
        self._waiting: list[_Waiting] = []
        self._lengths: Counter[int] = Counter()
        self._answer_tokens_cut = 0
        self._answers_cut_off = 0

    def add(
        self,
        messages: Sequence[Message],
        tools: Any,
        origin: str = "",
        other: Sequence[Message] | None = None,
    ) -> None:
        """`origin` is for what is said of the row; `other` is only shown to the template."""
        self._waiting.append(_Waiting(messages, tools, origin, other))
        if len(self._waiting) >= _BATCH_ROWS:
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
        )

    def refused(self) -> int:
        """How many rows the model's chat template refuses."""
        self._measure()
        return self._frames.refused

    def notes(self) -> list[str]:
        """What a person should know about the rows beside their lengths."""
        refused = self.refused()
        if not refused:
            return []
        rows = "1 row is" if refused == 1 else f"{refused:,} rows are"
        who = f"{rows} refused by {self._counter.name}'s chat template, first {self._frames.first_refused}"
        return [f"{who}: training on it would stop there"]

    def _measure(self) -> None:
        waiting, self._waiting = self._waiting, []
        texts = [self._render(row) for row in waiting]
        for text, length, row in zip(texts, self._counter.count(texts), waiting, strict=True):
            self._lengths[length] += 1
            if length > self._max_length:
                self._note_cut(text, self._frames.answers(text, row.messages))

    def _render(self, row: _Waiting) -> str:
        refused = self._frames.refused
        text = self._frames.render(row.messages, row.tools, row.origin)
        if row.other is not None and self._frames.refused == refused:  # rows are counted, not answers
            self._frames.render(row.other, row.tools, row.origin)
        return text

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
