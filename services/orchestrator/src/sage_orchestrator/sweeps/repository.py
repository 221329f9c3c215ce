"""Queries on sweeps, and the one way to change a sweep's status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, load_only

from sage_contracts.errors import NotFoundError
from sage_contracts.sweeps import SweepStatus
from sage_orchestrator.leases import guarded_update
from sage_orchestrator.paging import page_rows
from sage_orchestrator.rows import JobRow, SweepPointRow, SweepRow


def get(session: Session, sweep_id: str, *, lock: bool = False) -> SweepRow:
    """Raises: NotFoundError."""
    query = select(SweepRow).where(SweepRow.id == sweep_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFoundError(f"There is no sweep {sweep_id!r}: list them with GET /v1/sage/sweeps.")
    return row


def page(
    session: Session, *, after: str | None, limit: int, name: str | None
) -> tuple[Sequence[SweepRow], bool]:
    query = select(SweepRow)
    if name is not None:
        query = query.where(SweepRow.name == name)
    return page_rows(session, query, SweepRow, after=after, limit=limit)


def children(session: Session, sweep_ids: Sequence[str]) -> dict[str, list[tuple[SweepPointRow, JobRow]]]:
    """The points of each sweep, in the order of the grid, with what there is to tell of their jobs."""
    told = (JobRow.id, JobRow.name, JobRow.status, JobRow.metrics, JobRow.fine_tuned_model, JobRow.error)
    query = (
        select(SweepPointRow, JobRow)
        .join(JobRow, JobRow.id == SweepPointRow.job_id)
        .where(SweepPointRow.sweep_id.in_(sweep_ids))
        .order_by(SweepPointRow.number)
        .options(load_only(*told, raiseload=True))
    )
    found: dict[str, list[tuple[SweepPointRow, JobRow]]] = {sweep_id: [] for sweep_id in sweep_ids}
    for point, job in session.execute(query):
        found[point.sweep_id].append((point, job))
    return found


def open_ids(session: Session) -> Sequence[str]:
    query = select(SweepRow.id).where(SweepRow.status == SweepStatus.RUNNING.value)
    return session.scalars(query.order_by(SweepRow.seq)).all()


def change(session: Session, sweep_id: str, values: dict[str, Any]) -> bool:
    """Change a sweep if it has not ended. Says whether it did."""
    return guarded_update(session, SweepRow, sweep_id, values, sources=[SweepStatus.RUNNING.value])
