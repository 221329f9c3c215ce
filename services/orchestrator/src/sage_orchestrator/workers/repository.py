"""Queries on workers."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from sage_orchestrator.rows import WorkerRow


def get(session: Session, worker_id: str) -> WorkerRow | None:
    return session.get(WorkerRow, worker_id)


def everyone(session: Session) -> Sequence[WorkerRow]:
    return session.scalars(select(WorkerRow).order_by(WorkerRow.kind, WorkerRow.worker_id)).all()


def newest(session: Session, kind: str, *, seen_after: float) -> WorkerRow | None:
    query = select(WorkerRow).where(WorkerRow.kind == kind, WorkerRow.last_seen > seen_after)
    return session.scalar(query.order_by(WorkerRow.last_seen.desc()).limit(1))


def delete_unseen(session: Session, since: float) -> None:
    session.execute(delete(WorkerRow).where(WorkerRow.last_seen < since))


def see_again(session: Session, *, seen_after: float, now: float) -> None:
    """Take who was seen after that, by a clock that has been set since, as seen now."""
    session.execute(update(WorkerRow).where(WorkerRow.last_seen > seen_after).values(last_seen=now))
