"""Which tokens of a text carry its loss. No torch, no transformers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

Span = tuple[int, int]
"""Characters of a text, the end exclusive."""


def learned_tokens(
    text: str,
    learned: Sequence[Span],
    ids: Sequence[int],
    offsets: Sequence[Span],
    decode: Callable[[list[int]], str],
) -> Iterator[range]:
    """The places in `ids` of the tokens that begin in each span; token i stands at `offsets[i]`."""
    for start, end in learned:
        first = _first_token(text, start, ids, offsets, decode)
        yield range(first, bisect_left(offsets, (end,), first))


def _first_token(
    text: str, start: int, ids: Sequence[int], offsets: Sequence[Span], decode: Callable[[list[int]], str]
) -> int:
    """The first token that begins at `start` or later: one that began before belongs to the prompt."""
    first = bisect_left(offsets, (start,))
    # Some tokenizers trim spaces from the offsets: a line break before `start` then has no width at it.
    while first < len(ids) and offsets[first] == (start, start):
        token = decode([ids[first]])
        if not token or not text.endswith(token, 0, start):
            break
        first += 1
    return first
