"""Work that one worker holds by lease: what the sweeper does about it, and the guarded UPDATE of its row.

Jobs and merges are both such work. `judge` is a function of data and is tested without waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import CursorResult, update
from sqlalchemy.orm import Session

from sage_contracts.workers import ClaimRequest, Order

_MOST_DOUBLINGS = 4


@dataclass(frozen=True)
class Work:
    """The part of a row that the sweeper looks at."""

    is_running: bool
    is_queued: bool
    lease_expires_at: float | None
    ring_at: float | None
    lost_attempts: int
    pending_order: Order = Order.CONTINUE


class Sweep(Enum):
    """What is to be done with a piece of work."""

    LEAVE = auto()
    RING = auto()
    REQUEUE = auto()
    FAIL = auto()
    CANCEL = auto()
    PAUSE = auto()


def judge(work: Work, *, now: float, max_attempts: int) -> Sweep:
    """Rings for what waits, and decides on what a lost worker leaves behind."""
    if work.is_queued:
        return Sweep.RING if work.ring_at is not None and work.ring_at <= now else Sweep.LEAVE
    if not work.is_running or (work.lease_expires_at or 0) > now:
        return Sweep.LEAVE
    # The worker is gone, and what it had been told to do is simply done.
    if work.pending_order is Order.CANCEL:
        return Sweep.CANCEL
    if work.pending_order is Order.PAUSE:
        return Sweep.PAUSE
    return Sweep.FAIL if work.lost_attempts + 1 >= max_attempts else Sweep.REQUEUE


def next_ring_s(rings: int, backoff_s: float) -> float:
    """Seconds until a doorbell rung `rings` times (from 1) is rung again: 1, 2, 4, 8, 16 backoffs."""
    return float(backoff_s * 2 ** min(rings - 1, _MOST_DOUBLINGS))


def queued_values(now: float) -> dict[str, Any]:
    """Columns of work that waits for a worker; the bell is due at once."""
    return {"worker_id": None, "lease_expires_at": None, "ring_at": now, "rings": 0}


def ended_values(now: float) -> dict[str, Any]:
    return {"lease_expires_at": None, "ring_at": None, "finished_at": now}


def is_claimed_by(row: Any, request: ClaimRequest) -> bool:
    """Whether this very request has got the work already, and the reply was lost on its way."""
    is_same = request.claim_id is not None and row.claim_id == request.claim_id
    return is_same and row.status == "running"  # jobs and merges call it the same


def guarded_update(
    session: Session,
    row: Any,
    work_id: str,
    values: dict[str, Any],
    *,
    sources: Iterable[str],
    attempt: int | None = None,
    lease_before: float | None = None,
) -> bool:
    """Change a row only if it still is in one of `sources` (and in that attempt, its lease run out by then).

    Every change of status goes through here: who comes second changes nothing and learns it.
    """
    statement = update(row).where(row.id == work_id, row.status.in_(list(sources)))
    if attempt is not None:
        statement = statement.where(row.attempt == attempt)
    if lease_before is not None:
        statement = statement.where(row.lease_expires_at <= lease_before)
    result = session.execute(statement.values(values), execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    session.expire_all()
    return bool(result.rowcount == 1)


def renew_held(
    session: Session, row: Any, status: str, *, held_at: float, now: float, lease_s: float
) -> None:
    """Grant whole leases from now on to what was held at `held_at`, by the clock of that time."""
    held = update(row).where(row.status == status, row.lease_expires_at > held_at)
    session.execute(
        held.values(lease_expires_at=now + lease_s), execution_options={"synchronize_session": False}
    )


def ring_all(session: Session, row: Any, status: str, now: float) -> None:
    """Make every waiting bell due: when it was to ring was said by a clock that has been set since."""
    waiting = update(row).where(row.status == status, row.ring_at.is_not(None))
    session.execute(waiting.values(ring_at=now), execution_options={"synchronize_session": False})
