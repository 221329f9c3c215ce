"""Queries on merges, and the one way to change a merge's status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from sage_contracts.errors import NotFoundError
from sage_contracts.models import MergeRequest, MergeStatus
from sage_orchestrator.leases import guarded_update
from sage_orchestrator.rows import MergeRow


def get(session: Session, merge_id: str, *, lock: bool = False) -> MergeRow:
    """Raises: NotFoundError."""
    query = select(MergeRow).where(MergeRow.id == merge_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFoundError(f"There is no merge {merge_id!r}.")
    return row


def unfinished(
    session: Session, name: str, version: int, request: MergeRequest | None = None
) -> MergeRow | None:
    """One under way for this version; with a request one that writes to the same place."""
    open_states = [status.value for status in MergeStatus if not status.is_terminal]
    query = select(MergeRow).where(
        MergeRow.name == name, MergeRow.version == version, MergeRow.status.in_(open_states)
    )
    if request is not None:
        query = query.where(
            MergeRow.format == request.format,
            MergeRow.content == request.content,
            MergeRow.repo.is_not_distinct_from(request.repo),
        )
    return session.scalar(query.limit(1))


def change(
    session: Session,
    merge_id: str,
    values: dict[str, Any],
    *,
    sources: Iterable[MergeStatus],
    attempt: int | None = None,
    lease_before: float | None = None,
) -> bool:
    """Change a merge if it still is where the caller believes. Says whether it did."""
    return guarded_update(
        session,
        MergeRow,
        merge_id,
        values,
        sources=[source.value for source in sources],
        attempt=attempt,
        lease_before=lease_before,
    )


def due(session: Session, now: float) -> Sequence[MergeRow]:
    """Merges with a bell to ring or a lease that ran out."""
    bell = (MergeRow.status == MergeStatus.QUEUED.value) & (MergeRow.ring_at <= now)
    lost = (MergeRow.status == MergeStatus.RUNNING.value) & (MergeRow.lease_expires_at <= now)
    return session.scalars(select(MergeRow).where(or_(bell, lost)).order_by(MergeRow.created_at)).all()
