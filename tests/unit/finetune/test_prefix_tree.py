"""Rows laid end to end with their common beginnings once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.prefix_tree import (
    SHORTEST_SHARED,
    PackedRows,
    beginnings,
    distinct_tokens,
    pack,
    tokens_of,
)

pieces = st.lists(st.integers(1, 3), max_size=2 * SHORTEST_SHARED)


@st.composite
def families(draw: st.DrawFn) -> list[list[int]]:
    """Rows of which many begin alike, some are the same, and some are the beginning of another."""
    stems = draw(st.lists(pieces, min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        stem = draw(st.sampled_from(stems)) + draw(st.sampled_from([[], *stems]))
        rows.append([9, *stem, *draw(pieces)])
    return rows


@given(families(), st.sampled_from([1, 16]))
def test_every_row_is_there_in_order_and_every_token_is_some_rows(
    rows: list[list[int]], granule: int
) -> None:
    packed = pack(rows, granule)
    assert len(packed.ids) % granule == 0
    assert len(packed.places) == len(rows)
    for row, places in zip(rows, packed.places, strict=True):
        assert [packed.ids[place] for place in places] == row
        assert [packed.positions[place] for place in places] == list(range(len(row)))
    assert {place for row in packed.unfolded for place in row} == set(range(len(packed.ids)))
    assert sum(map(len, packed.unfolded)) - sum(map(len, rows)) < granule


@given(families(), st.sampled_from([1, 16]))
def test_by_the_segments_a_token_sees_what_is_before_it_in_its_row_and_nothing_else(
    rows: list[list[int]], granule: int
) -> None:
    packed = pack(rows, granule)
    for row in packed.unfolded:
        for index, place in enumerate(row):
            assert seen_from(place, packed) == row[: index + 1]


def seen_from(place: int, packed: PackedRows) -> list[int]:
    seen: list[int] = []
    for start, stop, end in packed.segments:
        if start <= place < stop:
            seen += range(start, place + 1)
        elif stop <= place < end:
            seen += range(start, stop)
    return seen


@given(families())
def test_what_is_common_is_laid_down_once(rows: list[list[int]]) -> None:
    packed = pack(rows)
    # A piece too short to be attended to apart is laid down again, at most once a row.
    assert distinct_tokens(rows) <= len(packed.ids) <= distinct_tokens(rows) + SHORTEST_SHARED * len(rows)


def test_a_prompt_of_all_rows_and_one_of_some_of_them() -> None:
    prompt, question = list(range(20, 50)), list(range(50, 70))
    rows = [[*prompt, 1, 2, 3], [*prompt, *question, 4], [*prompt, *question, 5, 6], [7, 8]]
    packed = pack(rows)
    assert len(packed.ids) == 30 + 3 + 20 + 1 + 2 + 2 == distinct_tokens(rows)
    # The last row, the prompt, what the first row goes on with, the question, an answer, another.
    assert packed.segments == [(0, 2, 2), (2, 32, 58), (32, 35, 35), (35, 55, 58), (55, 56, 56), (56, 58, 58)]


def test_rows_that_share_nothing_worth_it_are_segments_of_their_own() -> None:
    rows = [[1, 2, 3, 4], [1, 2, 3, 5], [6]]
    assert [stop - start for start, stop, _ in pack(rows).segments] == [4, 4, 1]
    assert pack([]).ids == []


@given(families(), st.integers(1, 120), st.none() | st.integers(1, 4))
def test_what_a_pass_computes_beyond_what_all_its_rows_share_is_within_the_budget(
    rows: list[list[int]], budget: int, max_rows: int | None
) -> None:
    groups = micro_batches(list(map(len, rows)), budget, max_rows, beginnings(rows))
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    assert max_rows is None or max(map(len, groups)) <= max_rows
    for group in groups:
        together = [rows[index] for index in group]
        common = min(beginnings(together).shared[1:], default=len(together[0]))
        assert len(group) == 1 or distinct_tokens(together) <= budget + common
        assert tokens_of(group, list(map(len, rows)), beginnings(rows)) == distinct_tokens(together)


def test_rows_that_begin_alike_go_through_the_model_together() -> None:
    prompts = [[place] * 600 for place in (1, 2)]
    rows = [[*prompts[index % 2], index + 3] for index in range(8)]
    groups = micro_batches([601] * 8, 512, None, beginnings(rows))
    assert sorted(sorted(group) for group in groups) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert len(micro_batches([601] * 8, 512)) == 8
    assert len(micro_batches([601] * 8, 1, None, beginnings(rows))) == 8
