"""How the forward passes of a step are dealt to processes."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.distributed.team import ALONE, dealt
from sage.tools.finetune.prefix_tree import distinct_tokens


def tokens_of(lengths: list[int]) -> Callable[[list[int]], int]:
    return lambda group: sum(lengths[index] for index in group)


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_every_row_is_dealt_to_one_hand_and_all_have_as_many_passes(rows: list[int], hands: int) -> None:
    shares = dealt(micro_batches(rows, 512), tokens_of(rows), hands)
    assert sorted(index for share in shares for group in share for index in group) == list(range(len(rows)))
    assert len({len(share) for share in shares}) == 1


@given(lengths, st.integers(1, 8))
def test_no_hand_has_more_than_its_share_and_one_pass(rows: list[int], hands: int) -> None:
    groups, tokens = micro_batches(rows, 512), tokens_of(rows)
    totals = [sum(map(tokens, share)) for share in dealt(groups, tokens, hands)]
    assert max(totals) <= sum(rows) / hands + max(map(tokens, groups))


def test_passes_are_dealt_by_what_they_compute() -> None:
    """Four rows behind one prompt are less work than any of the three beside them."""
    rows = [[*range(90), 100 + n] for n in range(4)] + [[200 + n, *range(120)] for n in range(3)]
    groups = [[0, 1, 2, 3], [4], [5], [6]]
    shares = dealt(groups, lambda group: distinct_tokens([rows[index] for index in group]), 2)
    assert shares == [[[4], [6]], [[5], [0, 1, 2, 3]]]


def test_alone_everything_stays_as_it_is() -> None:
    assert ALONE.share([[1], [0]], tokens_of([3, 2])) == [[1], [0]]
    assert ALONE.total(1.5) == 1.5
