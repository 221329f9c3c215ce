"""Rings due doorbells and takes back what lost workers held. What to do is decided in `leases.judge`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from sage_contracts.errors import TrainingFailedError
from sage_contracts.jobs import EventLevel, JobStatus
from sage_contracts.models import MergeStatus
from sage_contracts.workers import MERGE_TASK, TRAIN_TASK, Order
from sage_orchestrator.clock import Clock, Jumps, Rounds
from sage_orchestrator.database import Database
from sage_orchestrator.devices import ledger
from sage_orchestrator.devices import repository as devices
from sage_orchestrator.doorbell import Doorbell
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.leases import (
    Sweep,
    Work,
    ended_values,
    judge,
    next_ring_s,
    queued_values,
    renew_held,
    ring_all,
)
from sage_orchestrator.merges import repository as merges
from sage_orchestrator.rows import JobRow, LeasedWork, MergeRow
from sage_orchestrator.settings import OrchestratorSettings
from sage_orchestrator.workers import repository as workers
from sage_servicekit.broker import MOST_WAITING

logger = logging.getLogger(__name__)

_EVER = 0.0
_JOB_TARGETS = {
    Sweep.REQUEUE: JobStatus.QUEUED,
    Sweep.FAIL: JobStatus.FAILED,
    Sweep.CANCEL: JobStatus.CANCELLED,
    Sweep.PAUSE: JobStatus.PAUSED,
}


@dataclass(frozen=True)
class Sweeper:
    database: Database
    doorbell: Doorbell
    clock: Clock
    settings: OrchestratorSettings
    jumps: Jumps
    rounds: Rounds

    def sweep(self) -> bool:
        """Keep leases right, and take back what lost workers held; whether there are bells to ring for it."""
        had_gap = self.rounds.have_gap
        self.rounds.begin()
        self.follow_clock()
        if had_gap:
            logger.warning("nobody could be heard for a while: all that is held gets a whole lease")
            self.renew_all()
        moved = self.take_back()
        self.rounds.end()
        return moved

    def renew_all(self) -> None:
        """Grant whole leases anew to all that is held: while this process or its database was away, nobody
        could be heard, and a worker that is lost indeed is missed one lease later."""
        with self.database.write() as session:
            self._renew(session, held_at=_EVER, now=self.clock())
        self.rounds.end()

    def follow_clock(self) -> None:
        """Let leases and bells keep their time over a clock that was set and a machine that slept.

        No worker is lost by that, and what a lost one held is not kept for the hour that was set back.
        """
        jump_s = self.jumps.since_last()
        if not jump_s:
            return
        logger.warning("the clock jumped by %.0f s: leases and bells follow it", jump_s)
        now, settings = self.clock(), self.settings
        before = now - jump_s
        with self.database.write() as session:
            self._renew(session, held_at=before, now=now)
            for row in (JobRow, MergeRow):
                # Jobs and merges call this state by the same name.
                ring_all(session, row, JobStatus.QUEUED.value, now)
            workers.see_again(session, seen_after=before - settings.worker_seen_s, now=now)

    def _renew(self, session: Session, *, held_at: float, now: float) -> None:
        for row in (JobRow, MergeRow):
            # Jobs and merges call this state by the same name.
            running = JobStatus.RUNNING.value
            renew_held(session, row, running, held_at=held_at, now=now, lease_s=self.settings.lease_s)
        devices.renew_held(session, held_at=held_at, expires_at=now + self.settings.device_lease_s)

    def take_back(self) -> bool:
        """Move work whose lease ran out. Says whether there was any: then there are bells to ring."""
        now = self.clock()
        with self.database.read() as session:
            lost_jobs = jobs.lost(session, now)
            lost_merges = [(row, self._judge(row, now)) for row in merges.due(session, now)]
        moved = False
        for job_id in lost_jobs:
            moved |= self._take_back_job(job_id, now)
        for merge, verdict in lost_merges:
            if verdict in (Sweep.REQUEUE, Sweep.FAIL):
                moved |= self._take_back_merge(merge, verdict, now)
        return moved

    def ring_due(self) -> None:
        """Ring for what waits. What the broker refuses stays due and is rung again later."""
        now = self.clock()
        with self.database.read() as session:
            due: list[tuple[str, LeasedWork, str]] = [
                (TRAIN_TASK, row, row.id) for row in jobs.to_ring(session, now, most=MOST_WAITING)
            ]
            due += [
                (MERGE_TASK, row, row.id)
                for row in merges.due(session, now)
                if self._judge(row, now) is Sweep.RING
            ]
        full: set[str] = set()
        for task, row, work_id in due:
            # What finds no room stays due, so that the queue is filled up as workers empty it.
            if task not in full and not self._ring(task, row, work_id):
                full.add(task)

    def _judge(self, row: LeasedWork, now: float) -> Sweep:
        # Jobs and merges call these two states by the same names.
        work = Work(
            is_running=row.status == JobStatus.RUNNING.value,
            is_queued=row.status == JobStatus.QUEUED.value,
            lease_expires_at=row.lease_expires_at,
            ring_at=row.ring_at,
            lost_attempts=row.lost_attempts,
            pending_order=jobs.order_of(row) if isinstance(row, JobRow) else Order.CONTINUE,
        )
        return judge(work, now=now, max_attempts=self.settings.max_attempts)

    def _ring(self, task: str, row: LeasedWork, work_id: str) -> bool:
        """False: there was no room for it."""
        try:
            if not self.doorbell.ring(task, work_id):
                return False
        except Exception as error:
            # Whatever the broker's client raises: the work is safe in the database, only nobody knows yet.
            logger.warning("doorbell %s(%s) not delivered, ringing again later: %s", task, work_id, error)
            values: dict[str, Any] = {"ring_at": self.clock() + self.settings.ring_retry_s}
        else:
            rings = row.rings + 1
            wait_s = next_ring_s(rings, self.settings.ring_backoff_s)
            values = {"ring_at": self.clock() + wait_s, "rings": rings}
        with self.database.write() as session:
            # Only while it waits: a worker may have answered the bell already.
            if task == TRAIN_TASK:
                jobs.change_queued(session, work_id, values, attempt=row.attempt)
            else:
                merges.change(session, work_id, values, sources=[MergeStatus.QUEUED], attempt=row.attempt)
        return True

    def _take_back_job(self, job_id: str, now: float) -> bool:
        with self.database.write() as session:
            # Judged by what holds now: its owner may have given an order since it was found.
            row = jobs.lock_with_name(session, job_id)
            verdict = self._judge(row, now)
            if verdict not in _JOB_TARGETS:
                return False
            target, values, message = _fate_of(row, verdict, now)
            name, attempt, worker_id = row.name, row.attempt, row.worker_id
            is_ours = jobs.transition(
                session,
                job_id,
                target,
                values,
                sources=[JobStatus.RUNNING],
                attempt=attempt,
                lease_before=now,
            )
            if is_ours:
                ledger.release(session, ledger.training_holder(job_id), now)
                jobs.wake_same_name(session, name, now)
                level = EventLevel.ERROR if target is JobStatus.FAILED else EventLevel.WARN
                jobs.add_event(session, job_id, now, message, level=level)
                logger.warning("job %s, attempt %d on %s: %s", job_id, attempt, worker_id, message)
        return is_ours

    def _take_back_merge(self, row: MergeRow, verdict: Sweep, now: float) -> bool:
        values: dict[str, Any] = {"lost_attempts": row.lost_attempts + 1, "phase": None}
        if verdict is Sweep.FAIL:
            error = f"{row.lost_attempts + 1} mergers were lost with this merge; given up"
            values |= {"status": MergeStatus.FAILED.value, "error": error, **ended_values(now)}
        else:
            values |= {"status": MergeStatus.QUEUED.value, **queued_values(now)}
        with self.database.write() as session:
            return merges.change(
                session,
                row.id,
                values,
                sources=[MergeStatus.RUNNING],
                attempt=row.attempt,
                lease_before=now,
            )


def _fate_of(row: JobRow, verdict: Sweep, now: float) -> tuple[JobStatus, dict[str, Any], str]:
    """(where a lost worker's job goes, with which columns, what people read)."""
    target = _JOB_TARGETS[verdict]
    values: dict[str, Any] = {
        "lost_attempts": row.lost_attempts + 1,
        "pending_order": Order.CONTINUE.value,
    }
    values |= ended_values(now) if target.is_terminal else queued_values(now)
    if target is JobStatus.PAUSED:
        values["ring_at"] = None
    message = {
        Sweep.REQUEUE: "worker lost; resuming",
        Sweep.FAIL: f"{row.lost_attempts + 1} workers were lost, and none got the job further; given up",
        Sweep.CANCEL: "worker lost; the job was to be cancelled and is",
        Sweep.PAUSE: "worker lost; the job was to be paused and is",
    }[verdict]
    if target is JobStatus.FAILED:
        values["error"] = {"code": TrainingFailedError.code, "message": message, "param": None}
    return target, values, message


class Periodic:
    """A thread that works every `interval_s`, and at once when woken. An error is logged and survived."""

    def __init__(self, name: str, interval_s: float, work: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._work = work
        self._woken = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        """A ring that hangs in the broker's client is not waited for longer: the thread is a daemon."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            self._woken.clear()
            try:
                self._work()
            except Exception:
                logger.exception("%s failed; trying again in %.0f s", self._thread.name, self._interval_s)
            self._woken.wait(self._interval_s)
