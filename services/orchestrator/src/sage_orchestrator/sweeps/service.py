"""Sweeps: a grid of jobs, created together, compared at the end, the best one under the sweep's name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from sage_contracts.errors import ConflictError, InvalidRequestError
from sage_contracts.home import Home
from sage_contracts.jobs import CreateJobRequest, FineTuningJob, JobError, JobMetrics, JobStatus
from sage_contracts.paging import ListPage
from sage_contracts.sweeps import (
    CreateSweepRequest,
    Point,
    Sweep,
    SweepChild,
    SweepStatus,
    grid_points,
    point_fields,
    point_text,
    sweep_name_fault,
    value_text,
)
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.ids import new_id
from sage_orchestrator.jobs.resolve import name_of, task_of
from sage_orchestrator.jobs.service import JobService
from sage_orchestrator.jobs.stored import read_task
from sage_orchestrator.models import repository as models
from sage_orchestrator.models.registry import promote, versions_on_disk
from sage_orchestrator.paging import list_page
from sage_orchestrator.rows import JobRow, SweepPointRow, SweepRow, VersionRow
from sage_orchestrator.sweeps import repository as sweeps
from sage_orchestrator.sweeps.outcome import best_of, status_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepService:
    database: Database
    home: Home
    clock: Clock
    jobs: JobService

    def create(self, request: CreateSweepRequest) -> Sweep:
        """Look at the whole grid, then queue a job for each point, or none.

        Raises: InvalidRequestError naming the grid's field and value; whatever creating a job raises.
        """
        points = grid_points(request.grid, max_jobs=request.max_jobs)
        sweep_id = new_id("sweep")
        alone = CreateJobRequest(
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            sage=request.sage,
        )
        name, task = name_of(alone, sweep_id), task_of(alone)
        if fault := sweep_name_fault(name, len(points)):
            raise InvalidRequestError(f"sage.name: {fault}", param="sage.name")
        _refuse_said_twice(request)
        self.jobs.require_resolvable(alone)
        wanted = [_child_request(alone, sweep_id, name, n, point) for n, point in enumerate(points, 1)]
        for child, point in zip(wanted, points, strict=True):
            self._require_possible(child, point)
        now = self.clock()

        def store(session: Session, jobs: list[FineTuningJob]) -> None:
            row = SweepRow(
                id=sweep_id,
                name=name,
                task=task.value,
                model=jobs[0].model,
                grid=request.grid,
                status=SweepStatus.RUNNING.value,
                is_cancelling=False,
                created_at=now,
            )
            session.add(row)
            session.flush()
            session.add_all(
                SweepPointRow(sweep_id=sweep_id, number=number, job_id=job.id, point=point)
                for number, (job, point) in enumerate(zip(jobs, points, strict=True), 1)
            )

        self.jobs.create_together(wanted, store)
        return self.get(sweep_id)

    def get(self, sweep_id: str) -> Sweep:
        """Raises: NotFoundError."""
        with self.database.read() as session:
            return _to_object(sweeps.get(session, sweep_id), _children(session, [sweep_id])[sweep_id])

    def list_sweeps(self, *, after: str | None, limit: int, name: str | None) -> ListPage[Sweep]:
        """Newest first."""
        with self.database.read() as session:
            rows, has_more = sweeps.page(session, after=after, limit=limit, name=name)
            children = _children(session, [row.id for row in rows])
        return list_page([_to_object(row, children[row.id]) for row in rows], has_more)

    def cancel(self, sweep_id: str) -> Sweep:
        """Cancel what has not ended of it; models that were trained stay. Raises: ConflictError."""
        with self.database.write() as session:
            row = sweeps.get(session, sweep_id, lock=True)
            status = SweepStatus(row.status)
            if status not in (SweepStatus.RUNNING, SweepStatus.CANCELLED):
                raise ConflictError(f"{sweep_id} has {status.value} already: there is nothing to cancel.")
            sweeps.change(session, sweep_id, {"is_cancelling": True})
        self._tend(sweep_id)
        return self.get(sweep_id)

    def tend(self) -> None:
        """End the sweeps whose last job has ended, and finish cancellations that were cut short."""
        with self.database.read() as session:
            open_ids = sweeps.open_ids(session)
        for sweep_id in open_ids:
            self._tend(sweep_id)

    def _tend(self, sweep_id: str) -> None:
        with self.database.read() as session:
            row = sweeps.get(session, sweep_id)
            open_jobs = [
                job.id
                for _, job in sweeps.children(session, [sweep_id])[sweep_id]
                if not JobStatus(job.status).is_terminal
            ]
        if row.is_cancelling:
            for job_id in open_jobs:
                # It may have ended by itself meanwhile.
                with suppress(ConflictError):
                    self.jobs.cancel(job_id)
        elif open_jobs:
            return
        at_least = versions_on_disk(self.home, row.name) + 1
        with self.database.write() as session:
            promoted = self._end(session, sweep_id, at_least)
        if promoted is not None:
            self._link(*promoted)

    def _end(self, session: Session, sweep_id: str, at_least: int) -> tuple[str, str] | None:
        """The guarded last change. Where the name moved: the new version, and the one it stands on."""
        now = self.clock()
        row = sweeps.get(session, sweep_id, lock=True)
        children = _children(session, [sweep_id])[sweep_id]
        status = status_of([child.status for child in children], is_cancelling=row.is_cancelling)
        if not status.is_terminal or SweepStatus(row.status).is_terminal:
            return None
        best = best_of(children)
        values: dict[str, Any] = {
            "status": status.value,
            "finished_at": now,
        }
        promoted = None
        if status is SweepStatus.SUCCEEDED and best is not None and best.fine_tuned_model is not None:
            source = _version(session, best.fine_tuned_model)
            # None: its owner has deleted it already.
            if source is not None:
                version = promote(session, source, row.name, at_least=at_least, now=now)
                values["fine_tuned_model"] = f"{version.name}@{version.version}"
                promoted = (values["fine_tuned_model"], best.fine_tuned_model)
        sweeps.change(session, sweep_id, values)
        return promoted

    def _link(self, version: str, source: str) -> None:
        """Show people who look into the folder where the version's files are."""
        link, target = (
            self.home.finetune_output / name / "versions" / number
            for name, _, number in (version.partition("@"), source.partition("@"))
        )
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent))
        except OSError as error:
            logger.warning("%s does not lead to %s: %s", link, target, error)

    def _require_possible(self, request: CreateJobRequest, point: Point) -> None:
        try:
            self.jobs.require_resolvable(request)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"grid point {point_text(point)}: {error.message}", param="grid"
            ) from error


def _child_request(
    alone: CreateJobRequest, sweep_id: str, name: str, number: int, point: Point
) -> CreateJobRequest:
    config, fields = dict(alone.sage.config), point_fields(point)
    if "lora" in fields and isinstance(config.get("lora"), dict):
        fields["lora"] = {**config["lora"], **fields["lora"]}
    options = alone.sage.model_copy(update={"name": f"{name}-s{number}", "config": {**config, **fields}})
    labels = {f"sweep.{field}": value_text(value) for field, value in point.items()}
    return alone.model_copy(update={"sage": options, "metadata": {"sweep": sweep_id, **labels}})


def _refuse_said_twice(request: CreateSweepRequest) -> None:
    config = request.sage.config
    lora = config.get("lora")
    said = {*config, *(f"lora.{field}" for field in (lora if isinstance(lora, dict) else ()))}
    for field in request.grid:
        if field in said:
            raise InvalidRequestError(
                f"{field} is in sage.config and in the grid: name it in one of them.", param=f"grid.{field}"
            )


def _version(session: Session, model: str) -> VersionRow | None:
    name, _, version = model.partition("@")
    return models.get_version(session, name, int(version))


def _children(session: Session, sweep_ids: Sequence[str]) -> dict[str, list[SweepChild]]:
    return {
        sweep_id: [_to_child(point, job) for point, job in found]
        for sweep_id, found in sweeps.children(session, sweep_ids).items()
    }


def _to_object(row: SweepRow, children: list[SweepChild]) -> Sweep:
    best = best_of(children)
    return Sweep(
        id=row.id,
        created_at=int(row.created_at),
        finished_at=None if row.finished_at is None else int(row.finished_at),
        status=SweepStatus(row.status),
        is_cancelling=row.is_cancelling,
        name=row.name,
        task=read_task(row.task),
        model=row.model,
        grid=row.grid,
        children=children,
        best_job_id=best.job_id if best else None,
        fine_tuned_model=row.fine_tuned_model,
    )


def _to_child(point: SweepPointRow, job: JobRow) -> SweepChild:
    metrics = JobMetrics.model_validate(job.metrics)
    return SweepChild(
        job_id=job.id,
        name=job.name,
        point=point.point,
        status=JobStatus(job.status),
        step=metrics.step,
        total_steps=metrics.total_steps,
        loss=metrics.loss,
        base_eval_loss=metrics.base_eval_loss,
        eval_loss=metrics.eval_loss,
        fine_tuned_model=job.fine_tuned_model,
        error=None if job.error is None else JobError.model_validate(job.error),
    )
