"""The fake gateway's routes for files, jobs and sweeps."""

from __future__ import annotations

import time
from typing import Annotated, TypeVar

from fastapi import FastAPI, Query, UploadFile
from tests.fakes.fake_gateway_state import FAILURES, MODEL, State, make_job

from sage_contracts.config import Task
from sage_contracts.errors import ConflictError, NotFoundError
from sage_contracts.files import FileObject, FilePurpose
from sage_contracts.jobs import (
    CheckpointInfo,
    CheckpointMetrics,
    CreateJobRequest,
    EventType,
    FineTuningJob,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobStatus,
)
from sage_contracts.models import checkpoint_name
from sage_contracts.paging import Deleted, ListPage
from sage_contracts.sweeps import CreateSweepRequest, Sweep, SweepChild, SweepStatus, grid_points

# As the orchestrator's: more at once is refused.
Limit = Annotated[int, Query(ge=1, le=1000)]
SweepLimit = Annotated[int, Query(ge=1, le=100)]
Item = TypeVar("Item", FineTuningJob, JobEvent, Sweep)


def paged(items: list[Item], after: str | None, limit: int) -> ListPage[Item]:
    start = next((i + 1 for i, item in enumerate(items) if item.id == after), 0)
    data = items[start : start + limit]
    has_more = len(items) > start + limit
    return ListPage(data=data, has_more=has_more, last_id=data[-1].id if data else None)


def add_jobs(app: FastAPI, state: State) -> None:
    @app.post("/v1/files")
    async def upload(file: UploadFile) -> FileObject:
        content = await file.read()
        kept = FileObject(
            id=f"file-{next(state.counter)}",
            bytes=len(content),
            created_at=int(time.time()),
            filename=file.filename or "",
            purpose=FilePurpose.FINE_TUNE,
        )
        state.files[kept.id] = kept
        state.requests.append({"path": "upload", "filename": kept.filename, "bytes": kept.bytes})
        return kept

    @app.get("/v1/files/{file_id}")
    def file(file_id: str) -> FileObject:
        if file_id not in state.files:
            raise NotFoundError(f"There is no file {file_id!r}.", param="file_id")
        return state.files[file_id]

    @app.delete("/v1/files/{file_id}")
    def delete(file_id: str) -> Deleted:
        for fake in state.jobs.values():
            if fake.job.training_file == file_id and not fake.job.status.is_terminal:
                raise ConflictError(f"{file_id} is needed by the job {fake.job.id}: cancel that first.")
        del state.files[file_id]
        return Deleted(id=file_id, object="file")

    @app.post("/v1/fine_tuning/jobs")
    def create(request: CreateJobRequest) -> FineTuningJob:
        state.requests.append({"path": "job body", "body": request.model_dump(mode="json")})
        return make_job(state, request).job

    @app.get("/v1/fine_tuning/jobs")
    def jobs(limit: Limit = 20, after: str | None = None, name: str | None = None) -> ListPage[FineTuningJob]:
        newest = [fake.job for fake in reversed(state.jobs.values()) if name in (None, fake.job.sage.name)]
        return paged(newest, after, limit)

    @app.get("/v1/fine_tuning/jobs/{job_id}")
    def job(job_id: str) -> FineTuningJob:
        fake = state.job(job_id)
        fake.look()
        return fake.job

    @app.get("/v1/fine_tuning/jobs/{job_id}/events")
    def events(
        job_id: str,
        order: str = "desc",
        after: str | None = None,
        limit: Limit = 20,
        kind: Annotated[EventType | None, Query(alias="type")] = None,
    ) -> ListPage[JobEvent]:
        found = [event for event in state.job(job_id).events if kind in (None, event.type)]
        return paged(found if order == "asc" else found[::-1], after, limit)

    @app.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    def checkpoints(job_id: str) -> ListPage[JobCheckpoint]:
        """One a step, newest first; that of the first step has been removed since."""
        job = state.job(job_id).job
        done = job.sage.metrics.step or 0
        return ListPage(data=[checkpoint(job, step) for step in range(done, 0, -1)])

    @app.post("/v1/fine_tuning/jobs/{job_id}/{verb}")
    def act(job_id: str, verb: str) -> FineTuningJob:
        job = state.job(job_id).job
        target = {"cancel": JobStatus.CANCELLED, "pause": JobStatus.PAUSED, "resume": JobStatus.QUEUED}[verb]
        if not job.status.can_become(target):
            raise ConflictError(f"The job {job_id} is {job.status.value}: it cannot be told to {verb}.")
        job.status = target
        return job


def checkpoint(job: FineTuningJob, step: int) -> JobCheckpoint:
    return JobCheckpoint(
        id=f"ftckpt-{step}",
        created_at=job.created_at,
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=checkpoint_name(str(job.fine_tuned_model), step),
        step_number=step,
        metrics=CheckpointMetrics(step=step),
        sage=CheckpointInfo(is_servable=job.status is JobStatus.SUCCEEDED and step > 1),
    )


def add_sweeps(app: FastAPI, state: State) -> None:
    @app.post("/v1/sage/sweeps")
    def create(request: CreateSweepRequest) -> Sweep:
        state.requests.append({"path": "sweep body", "body": request.model_dump(mode="json")})
        name, sweep_id = request.sage.name or "code", f"sweep-{next(state.counter)}"
        children = []
        for number, point in enumerate(grid_points(request.grid, max_jobs=request.max_jobs), 1):
            options = request.sage.model_copy(update={"name": f"{name}-s{number}"})
            alone = CreateJobRequest(
                model=request.model,
                training_file=request.training_file,
                metadata={"sweep": sweep_id},
                sage=options,
            )
            job = make_job(state, alone).job
            children.append(SweepChild(job_id=job.id, name=job.sage.name, point=point, status=job.status))
        sweep = Sweep(
            id=sweep_id,
            created_at=int(time.time()),
            status=SweepStatus.RUNNING,
            name=name,
            task=Task.CODE,
            model=MODEL,
            grid=request.grid,
            children=children,
        )
        state.sweeps[sweep.id] = sweep
        return sweep

    @app.get("/v1/sage/sweeps")
    def list_sweeps(
        limit: SweepLimit = 20, after: str | None = None, name: str | None = None
    ) -> ListPage[Sweep]:
        newest = [sweep for sweep in reversed(state.sweeps.values()) if name in (None, sweep.name)]
        return paged(newest, after, limit)

    @app.get("/v1/sage/sweeps/{sweep_id}")
    def retrieve(sweep_id: str) -> Sweep:
        """Each look ends the next job: every second one fails, the rest get better and better."""
        if sweep_id not in state.sweeps:
            raise NotFoundError(f"There is no sweep {sweep_id}: list them with GET /v1/sage/sweeps.")
        sweep = state.sweeps[sweep_id]
        waiting = [child for child in sweep.children if not child.status.is_terminal]
        if sweep.name == "endless" or sweep.status.is_terminal:
            return sweep
        child, number = waiting[0], len(sweep.children) - len(waiting)
        if sweep.name == "stuck" and len(waiting) == 1:
            child.status = JobStatus.PAUSED
            child.error = JobError(code="insufficient_storage", message="The disk is full.")
            return sweep
        if number % 2 or sweep.name in FAILURES:
            child.status = JobStatus.FAILED
            child.error = JobError(code="training_failed", message="The loss became NaN at step 4.")
        else:
            child.status, child.step, child.total_steps, child.loss = JobStatus.SUCCEEDED, 4, 4, 2.1
            child.base_eval_loss, child.eval_loss = 2.391, 1.898 - number / 10
            child.fine_tuned_model, sweep.best_job_id = f"{child.name}@1", child.job_id
        if len(waiting) == 1:
            sweep.status = SweepStatus.SUCCEEDED if sweep.best_job_id else SweepStatus.FAILED
            sweep.fine_tuned_model = f"{sweep.name}@1" if sweep.best_job_id else None
            state.swept = {sweep.name: sweep.best_job_id} if sweep.best_job_id else {}
        return sweep

    @app.post("/v1/sage/sweeps/{sweep_id}/cancel")
    def cancel(sweep_id: str) -> Sweep:
        state.sweeps[sweep_id].status = SweepStatus.CANCELLED
        return state.sweeps[sweep_id]
