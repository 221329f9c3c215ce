"""Who works here: beats come in; who leaves is forgotten, and whoever is silent after an hour."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError

from sage_contracts.workers import WorkerBeat, WorkerSeen
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.rows import WorkerRow
from sage_orchestrator.workers import repository as workers

_FORGOTTEN_S = 3600.0


class WorkerService:
    def __init__(self, database: Database, clock: Clock, seen_s: float) -> None:
        self._database = database
        self._clock = clock
        self._seen_s = seen_s

    def beat(self, beat: WorkerBeat) -> None:
        try:
            self._record(beat)
        except IntegrityError:
            # Two first beats of one worker crossed; the row is there now.
            self._record(beat)

    def _record(self, beat: WorkerBeat) -> None:
        now = self._clock()
        with self._database.write() as session:
            row = workers.get(session, beat.worker_id)
            if row is None:
                row = WorkerRow(worker_id=beat.worker_id, first_seen=now)
                session.add(row)
            row.kind, row.device, row.detail, row.last_seen = beat.kind, beat.device, beat.detail, now
            row.device_total_bytes, row.device_free_bytes = beat.device_total_bytes, beat.device_free_bytes

    def everyone(self) -> list[WorkerSeen]:
        now = self._clock()
        with self._database.read() as session:
            return [
                WorkerSeen(
                    worker_id=row.worker_id,
                    kind=row.kind,
                    device=row.device,
                    device_total_bytes=row.device_total_bytes,
                    device_free_bytes=row.device_free_bytes,
                    detail=row.detail,
                    last_seen=row.last_seen,
                    is_up=now - row.last_seen < self._seen_s,
                )
                for row in workers.everyone(session)
            ]

    def training_device(self) -> tuple[str, int] | None:
        """Device and memory of the trainer seen last, so that `auto` fits the machine that trains."""
        with self._database.read() as session:
            row = workers.newest(session, "trainer", seen_after=self._clock() - self._seen_s)
        return None if row is None else (row.device, row.device_total_bytes)

    def forget(self, worker_id: str) -> None:
        with self._database.write() as session:
            workers.delete_one(session, worker_id)

    def forget_unseen(self) -> None:
        with self._database.write() as session:
            workers.delete_unseen(session, self._clock() - _FORGOTTEN_S)
