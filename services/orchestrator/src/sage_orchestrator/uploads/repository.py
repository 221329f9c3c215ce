"""Queries on uploads and their parts, and the one way to end an upload."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from sage_contracts.errors import NotFoundError
from sage_contracts.uploads import UploadStatus
from sage_orchestrator.leases import guarded_update
from sage_orchestrator.rows import UploadPartRow, UploadRow


def get(session: Session, upload_id: str, *, lock: bool = False) -> UploadRow:
    """Raises: NotFoundError."""
    query = select(UploadRow).where(UploadRow.id == upload_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFoundError(
            f"There is no upload {upload_id!r}: create one first (POST /v1/uploads).", param="upload_id"
        )
    return row


def parts_of(session: Session, upload_id: str) -> dict[str, UploadPartRow]:
    """By id."""
    rows = session.scalars(select(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
    return {row.id: row for row in rows}


def part_with(session: Session, upload_id: str, sha256: str) -> UploadPartRow | None:
    """The part that has these bytes."""
    query = select(UploadPartRow).where(UploadPartRow.upload_id == upload_id, UploadPartRow.sha256 == sha256)
    return session.scalar(query)


def all_part_ids(session: Session) -> set[str]:
    return set(session.scalars(select(UploadPartRow.id)))


def overdue(session: Session, now: float) -> Sequence[str]:
    query = select(UploadRow.id).where(
        UploadRow.status == UploadStatus.PENDING.value, UploadRow.expires_at <= now
    )
    return session.scalars(query).all()


def end(session: Session, upload_id: str, status: UploadStatus, *, file_id: str | None = None) -> bool:
    """End an upload that is pending, and forget its parts. Says whether it was."""
    values = {"status": status.value, "file_id": file_id}
    is_ours = guarded_update(session, UploadRow, upload_id, values, sources=[UploadStatus.PENDING.value])
    if is_ours:
        session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
    return is_ours
