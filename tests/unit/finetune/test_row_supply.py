"""A run of few steps renders as many rows as it needs, and goes on where rows turn out to be of no use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.row_supply import parts_needed
from sage_contracts.config import TrainingConfig


@given(st.lists(st.booleans(), max_size=200), st.integers(0, 6), st.integers(1, 4))
def test_rows_come_in_order_until_enough_are_usable(rows: list[bool], steps: int, batch: int) -> None:
    """A row says of itself whether it is usable."""
    config = TrainingConfig(max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
    seen: list[bool] = []
    for part in parts_needed(config, rows, lambda: sum(seen)):
        assert part
        seen.extend(part)
    assert seen == rows[: len(seen)]
    if steps == 0:
        assert seen == rows
        return
    assert sum(seen) >= min(steps * batch, sum(rows))
    if all(rows):
        assert len(seen) == min(steps * batch, len(rows))


def test_where_few_rows_are_usable_they_come_in_few_parts() -> None:
    config = TrainingConfig(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    rows = [False] * 100_000
    assert len(list(parts_needed(config, rows, lambda: 0))) < 20
