"""How the forward passes of a step are dealt to processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.distributed.team import ALONE, dealt

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_every_row_is_dealt_to_one_hand_and_all_have_as_many_passes(rows: list[int], hands: int) -> None:
    shares = dealt(micro_batches(rows, 512), rows, hands)
    assert sorted(index for share in shares for group in share for index in group) == list(range(len(rows)))
    assert len({len(share) for share in shares}) == 1


@given(lengths, st.integers(1, 8))
def test_no_hand_has_more_than_its_share_and_one_pass(rows: list[int], hands: int) -> None:
    groups = micro_batches(rows, 512)
    tokens = [sum(rows[index] for group in share for index in group) for share in dealt(groups, rows, hands)]
    longest = max(sum(rows[index] for index in group) for group in groups)
    assert max(tokens) <= sum(rows) / hands + longest


def test_alone_everything_stays_as_it_is() -> None:
    assert ALONE.share([[1], [0]], [3, 2]) == [[1], [0]]
    assert ALONE.total(1.5) == 1.5
