"""Rows of the ledger. Callers hold the device's row lock while they decide."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from sage_orchestrator.database import insert_unless_there
from sage_orchestrator.rows import DeviceLeaseRow, DeviceRow


def lock_device(session: Session, device: str, total_bytes: int) -> DeviceRow:
    """The device's row, locked until the transaction ends; its size is the largest ever reported."""
    query = select(DeviceRow).where(DeviceRow.device == device).with_for_update()
    row = session.scalar(query)
    if row is None:
        insert_unless_there(session, DeviceRow, device=device, total_bytes=0)
        row = session.scalars(query).one()
    row.total_bytes = max(row.total_bytes, total_bytes)
    return row


def live_leases(session: Session, device: str, now: float) -> Sequence[DeviceLeaseRow]:
    is_live = or_(DeviceLeaseRow.expires_at > now, DeviceLeaseRow.job_id.is_not(None))
    query = select(DeviceLeaseRow).where(DeviceLeaseRow.device == device, is_live)
    return session.scalars(query.order_by(DeviceLeaseRow.granted_at)).all()


def all_devices(session: Session) -> Sequence[DeviceRow]:
    return session.scalars(select(DeviceRow).order_by(DeviceRow.device)).all()


def lease_of(session: Session, holder: str) -> DeviceLeaseRow | None:
    return session.get(DeviceLeaseRow, holder)


def renew(session: Session, holder: str, expires_at: float, *, is_idle: bool = False) -> None:
    values = {"expires_at": expires_at, "is_idle": is_idle}
    session.execute(update(DeviceLeaseRow).where(DeviceLeaseRow.holder == holder).values(values))


def release(session: Session, holder: str) -> str | None:
    """The device that was given back; None when nothing was held."""
    return session.scalar(
        delete(DeviceLeaseRow).where(DeviceLeaseRow.holder == holder).returning(DeviceLeaseRow.device)
    )


def wanted_by(session: Session, device: str) -> str | None:
    return session.scalar(select(DeviceRow.wanted_by).where(DeviceRow.device == device))


def forget_want(session: Session, holder: str) -> None:
    session.execute(
        update(DeviceRow)
        .where(DeviceRow.wanted_by == holder)
        .values(wanted_by=None, wanted_label=None, wanted_bytes=0, wanted_until=None)
    )


def delete_expired(session: Session, now: float) -> None:
    session.execute(
        delete(DeviceLeaseRow).where(DeviceLeaseRow.expires_at <= now, DeviceLeaseRow.job_id.is_(None))
    )


def renew_held(session: Session, *, held_at: float, expires_at: float) -> None:
    """Renew what was leased at `held_at`, by the clock of that time."""
    session.execute(
        update(DeviceLeaseRow).where(DeviceLeaseRow.expires_at > held_at).values(expires_at=expires_at)
    )
