"""Queries on tuned models: names, versions, and what the bare name means."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from sage_orchestrator.database import insert_unless_there
from sage_orchestrator.rows import ModelRow, VersionRow


def lock_name(session: Session, name: str) -> ModelRow:
    """The name's row, made if need be and locked until the transaction ends."""
    query = select(ModelRow).where(ModelRow.name == name).with_for_update()
    row = session.scalar(query)
    if row is None:
        insert_unless_there(session, ModelRow, name=name)
        row = session.scalars(query).one()
    return row


def reserve_version(session: Session, name: str, *, at_least: int) -> int:
    """The next number of this name. It is never given again, whatever becomes of the job."""
    row = lock_name(session, name)
    row.last_version = max(row.last_version + 1, at_least)
    session.flush()
    return row.last_version


def get_version(session: Session, name: str, version: int) -> VersionRow | None:
    return session.get(VersionRow, (name, version))


def alias_version(session: Session, name: str) -> int | None:
    return session.scalar(select(ModelRow.alias_version).where(ModelRow.name == name))


def aliases(session: Session) -> dict[str, int]:
    """What each bare name means now."""
    rows = session.execute(
        select(ModelRow.name, ModelRow.alias_version)
        .where(ModelRow.alias_version.is_not(None))
        .order_by(ModelRow.name)
    )
    return {name: version for name, version in rows if version is not None}


def versions(session: Session, name: str | None = None) -> Sequence[VersionRow]:
    """Newest first."""
    query = select(VersionRow).order_by(
        VersionRow.created_at.desc(), VersionRow.name, VersionRow.version.desc()
    )
    return session.scalars(query if name is None else query.where(VersionRow.name == name)).all()


def newest_version(session: Session, name: str) -> int | None:
    return session.scalar(select(func.max(VersionRow.version)).where(VersionRow.name == name))


def set_merged(session: Session, name: str, version: int, merged_path: str) -> None:
    """Record where the merged weights of a version are."""
    session.execute(
        update(VersionRow)
        .where(VersionRow.name == name, VersionRow.version == version)
        .values(merged_path=merged_path)
    )
