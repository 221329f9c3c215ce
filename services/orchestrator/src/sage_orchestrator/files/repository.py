"""Queries on uploaded files."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import JobStatus
from sage_orchestrator.paging import PageOrder, page_rows
from sage_orchestrator.rows import FileRow, JobRow

_UNFINISHED = [status.value for status in JobStatus if not status.is_terminal]


def get(session: Session, file_id: str, *, param: str | None = None) -> FileRow:
    """Raises: NotFoundError."""
    row = session.scalar(select(FileRow).where(FileRow.id == file_id))
    if row is None:
        raise NotFoundError(f"There is no file {file_id!r}: upload it first (POST /v1/files).", param=param)
    return row


def page(
    session: Session, *, purpose: str | None, after: str | None, limit: int, order: PageOrder
) -> tuple[Sequence[FileRow], bool]:
    query = select(FileRow)
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    return page_rows(session, query, FileRow, after=after, limit=limit, order=order)


def unfinished_user(session: Session, file_id: str) -> str | None:
    """The id of a job that still needs this file."""
    uses_it = or_(JobRow.training_file == file_id, JobRow.validation_file == file_id)
    return session.scalar(select(JobRow.id).where(uses_it, JobRow.status.in_(_UNFINISHED)).limit(1))


def expired(session: Session, now: float) -> Sequence[FileRow]:
    return session.scalars(select(FileRow).where(FileRow.expires_at <= now)).all()
