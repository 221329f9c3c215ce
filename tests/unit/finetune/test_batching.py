"""The order of rows and how a step's rows share passes."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.batching import Schedule, micro_batches
from sage.tools.finetune.learning_rate import rate_factor


def schedule(rows: int = 10, batch: int = 4, epochs: float = 2, max_steps: int = -1) -> Schedule:
    return Schedule(rows=rows, batch_rows=batch, epochs=epochs, max_steps=max_steps, seed=1)


def test_every_epoch_takes_every_row_once_in_its_own_order() -> None:
    plan = schedule()
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 6)
    first = [row for step in range(3) for row in plan.rows_of(step)]
    second = [row for step in range(3, 6) for row in plan.rows_of(step)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert plan.rows_of(2) == schedule().rows_of(2)
    assert plan.epoch_of(3) == 1


def test_steps_come_from_epochs_or_from_max_steps() -> None:
    assert schedule(epochs=0.5).total_steps == 2
    assert schedule(epochs=0.01).total_steps == 1
    assert schedule(max_steps=7).total_steps == 7
    assert schedule(rows=3, batch=8).total_steps == 2
    # In binary 1.1 is a little more, and 2.2 * 395 too.
    assert schedule(rows=1600, batch=16, epochs=1.1).total_steps == 110
    assert schedule(rows=395, batch=1, epochs=2.2).total_steps == 869
    assert schedule(rows=1600, batch=16, epochs=1.101).total_steps == 111


def test_rows_that_no_step_gets_to_are_part_of_an_epoch() -> None:
    plan = Schedule(rows=8, batch_rows=4, epochs=1, max_steps=2, seed=1, rows_left=32)
    assert (plan.total_steps, plan.epoch_of(2)) == (2, 0.2)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.integers(1, 600),
    st.none() | st.integers(1, 8),
)
def test_micro_batches_hold_each_row_once_within_the_budget(
    lengths: list[int], budget: int, max_rows: int | None
) -> None:
    groups = micro_batches(lengths, budget, max_rows)
    assert max_rows is None or max(map(len, groups)) <= max_rows
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= budget


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(300, 3000))
def test_a_few_passes_are_equally_full(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget)
    even = ceil(sum(lengths) / len(groups))
    largest = max(sum(lengths[index] for index in group) for group in groups)
    if len(groups) <= 8:  # else a row of the fullest could go to one that is no fuller than even
        assert largest <= even + max(lengths)


def test_equal_rows_are_dealt_out_evenly() -> None:
    assert [len(group) for group in micro_batches([100] * 12, 768)] == [6, 6]
    assert sorted(len(group) for group in micro_batches([100] * 13, 768)) == [6, 7]


def test_the_rate_rises_from_above_zero_and_falls_to_zero() -> None:
    rates = [rate_factor("cosine", step, 20, 0.1) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert rate_factor("linear", 11, 20, 0.1) == 0.5
    assert rate_factor("constant", 0, 20, 0.1) == 1.0
    assert rate_factor("constant_with_warmup", 0, 20, 0.1) == 0.5
    assert rate_factor("cosine", 0, 1, 0.0) == 1.0
