"""What a sweep comes to, given its jobs. Functions of data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sage_contracts.jobs import JobStatus
from sage_contracts.sweeps import SweepChild, SweepStatus


def status_of(statuses: Sequence[JobStatus], *, is_cancelling: bool) -> SweepStatus:
    """A failed job does not end a sweep, and does not spoil it: one success is enough."""
    if not all(status.is_terminal for status in statuses):
        return SweepStatus.RUNNING
    if is_cancelling:
        return SweepStatus.CANCELLED
    if JobStatus.SUCCEEDED in statuses:
        return SweepStatus.SUCCEEDED
    return SweepStatus.FAILED if JobStatus.FAILED in statuses else SweepStatus.CANCELLED


def best_of(children: Sequence[SweepChild]) -> SweepChild | None:
    """The success with the lowest held-out loss, the earlier of equal ones; None where no loss is known."""
    measured = [
        child
        for child in children
        if child.status is JobStatus.SUCCEEDED
        and child.eval_loss is not None
        and math.isfinite(child.eval_loss)
    ]
    return min(measured, key=lambda child: child.eval_loss or 0.0, default=None)
