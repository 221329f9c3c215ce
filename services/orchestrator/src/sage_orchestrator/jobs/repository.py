"""Queries on jobs, their events and checkpoints, and the one way to change a job's status."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, load_only

from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import EventLevel, EventType, JobStatus
from sage_contracts.workers import CheckpointReport, EventReport, Order
from sage_orchestrator.ids import new_id
from sage_orchestrator.leases import guarded_update
from sage_orchestrator.models import repository as models
from sage_orchestrator.paging import PageOrder, page_rows
from sage_orchestrator.rows import CheckpointRow, EventRow, JobRow


def get(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """Raises: NotFoundError."""
    query = select(JobRow).where(JobRow.id == job_id)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFoundError(
            f"There is no fine-tuning job {job_id!r}: list them with GET /v1/fine_tuning/jobs."
        )
    return row


def lock_with_name(session: Session, job_id: str) -> JobRow:
    """For a change that concerns other jobs of the name, or the name itself.

    Everybody locks the name before any of its jobs: in another order two of them would wait for each other.

    Raises: NotFoundError.
    """
    name = session.scalar(select(JobRow.name).where(JobRow.id == job_id))
    if name is not None:
        models.lock_name(session, name)
    return get(session, job_id, lock=True)


def transition(
    session: Session,
    job_id: str,
    target: JobStatus,
    values: dict[str, Any],
    *,
    sources: Iterable[JobStatus],
    attempt: int | None = None,
    lease_before: float | None = None,
) -> bool:
    """Move a job to `target` if it still is where the caller believes. Says whether it moved."""
    allowed = [source for source in sources if source.can_become(target)]
    return guarded_update(
        session,
        JobRow,
        job_id,
        {"status": target.value, **values},
        sources=[source.value for source in allowed],
        attempt=attempt,
        lease_before=lease_before,
    )


def change(session: Session, job_id: str, values: dict[str, Any], *, attempt: int | None = None) -> bool:
    """Change a running job without moving it, if it still runs (and in that attempt)."""
    return guarded_update(session, JobRow, job_id, values, sources=[JobStatus.RUNNING.value], attempt=attempt)


def change_queued(session: Session, job_id: str, values: dict[str, Any], *, attempt: int) -> bool:
    """Change a waiting job without moving it, if it still waits since that attempt."""
    return guarded_update(session, JobRow, job_id, values, sources=[JobStatus.QUEUED.value], attempt=attempt)


def page(
    session: Session, *, after: str | None, limit: int, name: str | None, labels: dict[str, str]
) -> tuple[Sequence[JobRow], bool]:
    query = select(JobRow)
    if name is not None:
        query = query.where(JobRow.name == name)
    for key, value in labels.items():
        query = query.where(JobRow.labels[key].as_string() == value)
    return page_rows(session, query, JobRow, after=after, limit=limit)


def event_page(
    session: Session,
    job_id: str,
    *,
    after: str | None,
    limit: int,
    order: PageOrder,
    kind: EventType | None,
) -> tuple[Sequence[EventRow], bool]:
    query = select(EventRow).where(EventRow.job_id == job_id)
    if kind is not None:
        is_metrics = EventRow.type == "metrics"
        query = query.where(is_metrics if kind == "metrics" else ~is_metrics)
    return page_rows(session, query, EventRow, after=after, limit=limit, order=order)


def newest_event(session: Session, job_id: str) -> EventRow | None:
    query = select(EventRow).where(EventRow.job_id == job_id)
    return session.scalar(query.order_by(EventRow.seq.desc()).limit(1))


def event_data(session: Session, job_id: str) -> Iterator[dict[str, Any]]:
    """The figures of a job's events, oldest first."""
    query = select(EventRow.data).where(EventRow.job_id == job_id).order_by(EventRow.seq)
    return (data for data in session.scalars(query.execution_options(yield_per=1000)) if data)


def last_told_step(session: Session, job_id: str) -> int:
    """The latest with figures; 0 where there is none."""
    query = select(func.max(EventRow.data["step"].as_integer()))
    return session.scalar(query.where(EventRow.job_id == job_id, EventRow.type == "metrics")) or 0


def figures_at(session: Session, job_id: str, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What the events of each of these steps measured; of a repeated step the later figures count."""
    query = select(EventRow.data).where(
        EventRow.job_id == job_id, EventRow.data["step"].as_integer().in_(steps)
    )
    figures: dict[int, dict[str, Any]] = {step: {} for step in steps}
    for data in session.scalars(query.order_by(EventRow.seq)):
        if data:
            known = {key: value for key, value in data.items() if value is not None}
            figures[data["step"]].update(known)
    return figures


def checkpoint_page(
    session: Session, job_id: str, *, after: str | None, limit: int
) -> tuple[Sequence[CheckpointRow], bool]:
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
    return page_rows(session, query, CheckpointRow, after=after, limit=limit)


def checkpoints(session: Session, job_id: str) -> Sequence[CheckpointRow]:
    """All that were reported, by step."""
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
    return session.scalars(query.order_by(CheckpointRow.step)).all()


def is_name_running(session: Session, name: str, *, besides: str) -> bool:
    """Whether another job writes into this name's folder now."""
    query = select(JobRow.id).where(
        JobRow.name == name, JobRow.status == JobStatus.RUNNING.value, JobRow.id != besides
    )
    return session.scalar(query.limit(1)) is not None


def begun_and_unfinished(session: Session, *, besides: str) -> list[str]:
    """Jobs that may go on from checkpoints of theirs."""
    ended = [status.value for status in JobStatus if status.is_terminal]
    query = select(JobRow.id).where(JobRow.attempt > 0, JobRow.status.not_in(ended), JobRow.id != besides)
    return list(session.scalars(query))


def wake_same_name(session: Session, name: str, now: float) -> None:
    """The name's folder is free: who has waited longest for it may start, and its end wakes the next.

    Under the name's lock: without it, who has waited longest may be about to leave the queue.
    """
    waiting = (JobRow.name == name) & (JobRow.status == JobStatus.QUEUED.value)
    session.execute(
        update(JobRow)
        .where(JobRow.seq == select(func.min(JobRow.seq)).where(waiting).scalar_subquery())
        .values(ring_at=now)
        .execution_options(synchronize_session=False)
    )


def ring_queued(session: Session, job_id: str, now: float) -> None:
    """Make the bell of a waiting job due."""
    session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == JobStatus.QUEUED.value)
        .values(ring_at=now)
        .execution_options(synchronize_session=False)
    )


def lost(session: Session, now: float) -> Sequence[str]:
    """The ids of jobs whose lease ran out."""
    query = select(JobRow.id).where(JobRow.status == JobStatus.RUNNING.value, JobRow.lease_expires_at <= now)
    return session.scalars(query.order_by(JobRow.seq)).all()


def to_ring(session: Session, now: float, *, most: int) -> Sequence[JobRow]:
    """The first of the jobs whose bell is due, with no more of them than a bell needs."""
    query = select(JobRow).where(JobRow.status == JobStatus.QUEUED.value, JobRow.ring_at <= now)
    needed = load_only(JobRow.id, JobRow.attempt, JobRow.rings, raiseload=True)
    return session.scalars(query.order_by(JobRow.seq).limit(most).options(needed)).all()


def ids_in(session: Session, status: JobStatus) -> Sequence[str]:
    return session.scalars(select(JobRow.id).where(JobRow.status == status.value).order_by(JobRow.seq)).all()


def eta_s(session: Session, job_id: str) -> float | None:
    """Seconds that a running job believes it still needs."""
    query = select(JobRow.metrics).where(JobRow.id == job_id, JobRow.status == JobStatus.RUNNING.value)
    metrics = session.scalar(query) or {}
    eta = metrics.get("eta_s")
    return None if eta is None else float(eta)


def add_event(
    session: Session, job_id: str, now: float, message: str, *, level: EventLevel = EventLevel.INFO
) -> None:
    add_events(session, job_id, [EventReport(created_at=now, level=level, message=message)])


def add_events(session: Session, job_id: str, reports: Iterable[EventReport]) -> None:
    session.add_all(
        EventRow(
            id=new_id("ftevent"),
            job_id=job_id,
            created_at=report.created_at,
            level=report.level.value,
            message=report.message,
            type=report.type,
            data=report.data,
        )
        for report in reports
    )
    session.flush()


def is_further(session: Session, job_id: str, reports: Sequence[CheckpointReport]) -> bool:
    """Whether one of these checkpoints is of a later step than all before."""
    if not reports:
        return False
    latest = session.scalar(select(func.max(CheckpointRow.step)).where(CheckpointRow.job_id == job_id))
    return max(report.step for report in reports) > (latest or 0)


def add_checkpoints(session: Session, job_id: str, now: float, reports: Iterable[CheckpointReport]) -> None:
    """A step that an earlier attempt had reached already is recorded anew in its place."""
    for report in reports:
        row = session.scalar(
            select(CheckpointRow).where(CheckpointRow.job_id == job_id, CheckpointRow.step == report.step)
        )
        if row is None:
            row = CheckpointRow(id=new_id("ftckpt"), job_id=job_id, step=report.step, created_at=now)
            session.add(row)
        row.path, row.train_loss, row.eval_loss = report.path, report.train_loss, report.eval_loss
    session.flush()


def order_of(row: JobRow) -> Order:
    return Order(row.pending_order)
