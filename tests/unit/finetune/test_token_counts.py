"""What rows come to in tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.token_counts import count_tokens


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 2048), st.integers(1, 16))
def test_counts_add_up(lengths: list[int], max_length: int, batch_rows: int) -> None:
    counts = count_tokens(lengths, max_length=max_length, batch_rows=batch_rows)
    assert counts.rows == sum(rows for _, rows in counts.histogram) == len(lengths)
    assert counts.tokens + counts.lost_tokens == sum(lengths)
    assert (counts.lost_tokens > 0) == (counts.truncated_rows > 0)
    assert counts.tokens <= counts.padded_tokens <= len(lengths) * min(max_length, max(lengths))
    assert 0 <= counts.padding_saved < 1
    assert counts.shortest <= counts.mean <= counts.longest
    for share, length in counts.percentiles.items():
        within = sum(other <= length for other in lengths)
        assert within * 100 >= int(share) * len(lengths)
        assert length in lengths
    assert [top for top, _ in counts.histogram] == sorted({top for top, _ in counts.histogram})


def test_an_example() -> None:
    counts = count_tokens([10, 30, 20, 100], max_length=40, batch_rows=2, dropped_rows=1)
    assert (counts.tokens, counts.truncated_rows, counts.lost_tokens) == (100, 1, 60)
    assert (counts.padded_tokens, round(counts.padding_saved, 3)) == (2 * 30 + 2 * 40, 0.286)
    assert counts.histogram == [(32, 3), (128, 1)]
    assert counts.percentiles == {"50": 20, "90": 100, "99": 100}
    assert counts.dropped_rows == 1
    assert count_tokens([5], max_length=9, batch_rows=8).padding_saved == 0
