"""Queries on uploaded files."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import JobStatus
from sage_orchestrator.paging import PageOrder, page_rows
from sage_orchestrator.rows import FileRow, JobRow

DELETED = "deleted"
"""The purpose of a row whose file is gone: it only keeps its place, so that whoever deletes what they list,
page by page, can ask for the page after it."""
_PLACE_KEPT_S = 24 * 3600.0
_THERE = FileRow.purpose != DELETED
_UNFINISHED = [status.value for status in JobStatus if not status.is_terminal]


def get(session: Session, file_id: str, *, param: str | None = None) -> FileRow:
    """Raises: NotFoundError."""
    row = session.scalar(select(FileRow).where(FileRow.id == file_id, _THERE))
    if row is None:
        raise NotFoundError(f"There is no file {file_id!r}: upload it first (POST /v1/files).", param=param)
    return row


def page(
    session: Session, *, purpose: str | None, after: str | None, limit: int, order: PageOrder
) -> tuple[Sequence[FileRow], bool]:
    query = select(FileRow).where(_THERE)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    return page_rows(session, query, FileRow, after=after, limit=limit, order=order)


def unfinished_user(session: Session, file_id: str) -> str | None:
    """The id of a job that still needs this file."""
    uses_it = or_(JobRow.training_file == file_id, JobRow.validation_file == file_id)
    return session.scalar(select(JobRow.id).where(uses_it, JobRow.status.in_(_UNFINISHED)).limit(1))


def expired(session: Session, now: float) -> Sequence[FileRow]:
    return session.scalars(select(FileRow).where(FileRow.expires_at <= now, _THERE)).all()


def forget(row: FileRow, now: float) -> None:
    """Leave nothing of a file but its place in the list, for a day."""
    row.purpose, row.filename, row.path, row.size_bytes = DELETED, "", "", 0
    row.expires_at = now + _PLACE_KEPT_S


def give_up_places(session: Session, now: float) -> None:
    """Remove the rows of files that were deleted long ago."""
    session.execute(delete(FileRow).where(FileRow.expires_at <= now, ~_THERE))
