"""As many rows as a run of few steps needs: the others need not be rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sage_contracts.config import TrainingConfig

Row = TypeVar("Row")


def parts_needed(
    config: TrainingConfig, rows: Sequence[Row], usable: Callable[[], int]
) -> Iterator[Sequence[Row]]:
    """Parts of the shuffled rows, until so many of what was given are `usable` as all steps take.

    Rows whose answers lie beyond max_length are only known once they are rendered. Without `max_steps` all
    rows are one part.
    """
    needed = config.max_steps * config.effective_batch_size if config.max_steps > 0 else len(rows)
    given = 0
    while given < len(rows) and (missing := needed - usable()) > 0:
        # At least as many as so far: where few of many rows are usable, that takes few rounds.
        part = rows[given : given + max(missing, given)]
        given += len(part)
        yield part
