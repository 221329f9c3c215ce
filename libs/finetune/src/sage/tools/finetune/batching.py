"""Which rows meet in which optimiser step, and how a step's rows share forward passes. Pure; no torch.

Everything is a function of the step number, so that a resumed run sees the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from random import Random


@dataclass(frozen=True)
class Schedule:
    rows: int
    batch_rows: int
    """Rows per optimiser step (the effective batch)."""
    epochs: float
    max_steps: int
    """-1: as the epochs say."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.rows / self.batch_rows)

    @property
    def total_steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else max(1, ceil(self.steps_per_epoch * self.epochs))

    def epoch_of(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """Row indices of step 0, 1, …; every epoch has its own order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.rows, f"{self.seed}/{epoch}")
        return order[position * self.batch_rows : (position + 1) * self.batch_rows]


@lru_cache(maxsize=1)  # every step of an epoch asks, and a million rows take half a second
def _order(rows: int, seed: str) -> list[int]:
    order = list(range(rows))
    Random(seed).shuffle(order)
    return order


def micro_batches(lengths: Sequence[int], token_budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Indices in groups of at most `max_rows` whose tokens fit the budget; a longer row goes alone.

    First-fit decreasing: long rows first, so that groups come out equally full and few.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        has_room = (g for g, left in enumerate(room) if length <= left and len(groups[g]) != max_rows)
        fit = next(has_room, None)
        if fit is None:
            groups.append([index])
            room.append(token_budget - length)
        else:
            groups[fit].append(index)
            room[fit] -= length
    return groups
