"""What the rows of a run come to in tokens: how long, how many cut, how much padding is saved. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

PERCENTILES = (50, 90, 99)


class TokenCounts(BaseModel):
    """Of the training rows, before `max_length` cuts them where not said otherwise."""

    model_config = ConfigDict(extra="forbid")

    rows: int
    tokens: int
    """After the cut: what an epoch trains on, prompts included."""
    shortest: int
    mean: float
    percentiles: dict[str, int]
    """`{"50": …, "90": …, "99": …}`."""
    longest: int
    histogram: list[tuple[int, int]]
    """(a bin's highest number of tokens, rows in it); bins double."""
    truncated_rows: int
    lost_tokens: int
    dropped_rows: int
    """Their answer begins beyond `max_length`: nothing is left to learn."""
    padded_tokens: int
    """What an epoch would compute if each batch were padded to its longest row."""
    padding_saved: float
    """Share of that which is not computed, because rows are packed."""


def count_tokens(
    lengths: Sequence[int], *, max_length: int, batch_rows: int, dropped_rows: int = 0
) -> TokenCounts:
    """`lengths` are those of the whole rows in the order of the run, at least one, dropped ones left out."""
    kept = [min(length, max_length) for length in lengths]
    batches = [kept[start : start + batch_rows] for start in range(0, len(kept), batch_rows)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    ordered = sorted(lengths)
    return TokenCounts(
        rows=len(lengths),
        tokens=sum(kept),
        shortest=ordered[0],
        mean=sum(lengths) / len(lengths),
        percentiles={str(share): _percentile(ordered, share) for share in PERCENTILES},
        longest=ordered[-1],
        histogram=_histogram(ordered),
        truncated_rows=sum(length > max_length for length in lengths),
        lost_tokens=sum(lengths) - sum(kept),
        dropped_rows=dropped_rows,
        padded_tokens=padded,
        padding_saved=1 - sum(kept) / padded,
    )


def _percentile(ordered: Sequence[int], share: int) -> int:
    """The smallest length that so many of a hundred rows do not exceed."""
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def _histogram(ordered: Sequence[int]) -> list[tuple[int, int]]:
    bins: dict[int, int] = {}
    top = 32
    for length in ordered:
        while length > top:
            top *= 2
        bins[top] = bins.get(top, 0) + 1
    return list(bins.items())
