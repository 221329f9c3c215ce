"""Which rows meet in which optimiser step, and how a step's rows share forward passes. Pure; no torch.

Everything is a function of the step number, so that a resumed run sees the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from random import Random

from sage.tools.finetune.prefix_tree import SHORTEST_SHARED, Beginnings, tokens_of

FEW_GROUPS = 8
"""More are nearly full anyway."""


@dataclass(frozen=True)
class Schedule:
    rows: int
    batch_rows: int
    """Rows per optimiser step (the effective batch)."""
    epochs: float
    max_steps: int
    """-1: as the epochs say."""
    seed: int
    rows_left: int = 0
    """More rows there are, that no step gets to: an epoch would take them too."""

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.rows / self.batch_rows)

    @property
    def total_steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        # 1.1 epochs of 100 steps are 110.00000000000001 in floats, and not 111 steps.
        return max(1, ceil(round(self.steps_per_epoch * self.epochs, 6)))

    def epoch_of(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / ceil((self.rows + self.rows_left) / self.batch_rows)

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


def micro_batches(
    lengths: Sequence[int],
    token_budget: int,
    max_rows: int | None = None,
    alike: Beginnings | None = None,
) -> list[list[int]]:
    """Indices in groups of at most `max_rows` whose tokens fit the budget; a longer row goes alone.

    With `alike`, neighbours that begin alike stay together. What all of a group share is on top of the
    budget: otherwise more groups would compute it, and it is never more than one row.

    As few groups as first-fit decreasing finds, and where they are few, about equally full: the fullest
    decides how much memory a step takes.
    """
    bundles = [_Bundle([index], length) for index, length in enumerate(lengths)]
    if alike:
        bundles = _bundled(lengths, token_budget, max_rows, alike)
    groups: list[_Bundle] = []
    for bundle in sorted(bundles, key=lambda bundle: (-bundle.tokens, bundle.rows)):
        fit = next((group for group in groups if group.has_room(bundle, token_budget, max_rows)), None)
        if fit is None:
            groups.append(bundle)
        else:
            fit.take(bundle)
    found = [group.rows for group in groups]
    if 1 < len(found) <= FEW_GROUPS:
        _even_out(found, lengths, max_rows, alike)
    return found


def _even_out(
    groups: list[list[int]], lengths: Sequence[int], max_rows: int | None, alike: Beginnings | None
) -> None:
    """Move rows from the fullest to the emptiest as long as that helps and no more is computed for it."""

    def tokens(rows: Sequence[int]) -> int:
        return tokens_of(rows, lengths, alike) if alike else sum(lengths[row] for row in rows)

    while True:
        groups.sort(key=tokens, reverse=True)
        fullest, emptiest = groups[0], groups[-1]
        most, least = tokens(fullest), tokens(emptiest)
        moves = [
            (max(left, more), row)
            for row in fullest
            if (left := tokens([other for other in fullest if other != row]))
            + (more := tokens([*emptiest, row]))
            <= most + least
        ]
        if not moves or min(moves)[0] >= most or len(emptiest) == max_rows:
            return
        row = min(moves)[1]
        fullest.remove(row)
        emptiest.append(row)


@dataclass
class _Bundle:
    rows: list[int]
    tokens: int

    def has_room(self, other: _Bundle, token_budget: int, max_rows: int | None) -> bool:
        fits = max_rows is None or len(self.rows) + len(other.rows) <= max_rows
        return fits and self.tokens + other.tokens <= token_budget

    def take(self, other: _Bundle) -> None:
        self.rows += other.rows
        self.tokens += other.tokens


def _bundled(
    lengths: Sequence[int], token_budget: int, max_rows: int | None, alike: Beginnings
) -> list[_Bundle]:
    """Neighbours that share their beginning, as many as fit."""
    bundles: list[_Bundle] = []
    common = 0  # of all rows of the last bundle
    for index, shared in zip(*alike, strict=True):
        common = min(common, shared)
        added = _Bundle([index], lengths[index] - shared)
        if common >= SHORTEST_SHARED and bundles[-1].has_room(added, token_budget + common, max_rows):
            bundles[-1].take(added)
        else:
            bundles.append(_Bundle([index], lengths[index]))
            common = lengths[index]
    return bundles
