"""/v1/fine_tuning/jobs: OpenAI's fine-tuning API, and /internal/jobs for workers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from sage_contracts.jobs import CreateJobRequest, EventType, FineTuningJob, JobCheckpoint, JobEvent
from sage_contracts.paging import ListPage
from sage_contracts.workers import ClaimRequest, Finish, Report, ReportReply, TrainClaim
from sage_orchestrator.jobs.attempts import AttemptService
from sage_orchestrator.jobs.service import JobService
from sage_orchestrator.paging import PageOrder
from sage_servicekit.app import require_internal

# OpenAI stops at 100; more is our extension, for people who follow a long log.
Limit = Annotated[int, Query(ge=1, le=1000)]


def make_router(service: JobService) -> APIRouter:
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

    @router.post("")
    def create(request: CreateJobRequest) -> FineTuningJob:
        return service.create(request)

    @router.get("")
    def list_jobs(
        request: Request, after: str | None = None, limit: Limit = 20, name: str | None = None
    ) -> ListPage[FineTuningJob]:
        return service.list_jobs(after=after, limit=limit, name=name, labels=_labels(request))

    @router.get("/{job_id}")
    def retrieve(job_id: str) -> FineTuningJob:
        return service.get(job_id)

    @router.post("/{job_id}/cancel")
    def cancel(job_id: str) -> FineTuningJob:
        return service.cancel(job_id)

    @router.post("/{job_id}/pause")
    def pause(job_id: str) -> FineTuningJob:
        return service.pause(job_id)

    @router.post("/{job_id}/resume")
    def resume(job_id: str) -> FineTuningJob:
        return service.resume(job_id)

    @router.get("/{job_id}/events")
    def events(
        job_id: str,
        after: str | None = None,
        limit: Limit = 20,
        order: PageOrder = "desc",
        kind: Annotated[EventType | None, Query(alias="type")] = None,
    ) -> ListPage[JobEvent]:
        return service.list_events(job_id, after=after, limit=limit, order=order, kind=kind)

    @router.get("/{job_id}/checkpoints")
    def checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> ListPage[JobCheckpoint]:
        return service.list_checkpoints(job_id, after=after, limit=limit)

    return router


def make_internal_router(attempts: AttemptService) -> APIRouter:
    router = APIRouter(prefix="/internal/jobs", dependencies=[Depends(require_internal)], tags=["workers"])

    @router.post("/{job_id}/claim")
    def claim(job_id: str, request: ClaimRequest) -> TrainClaim:
        return attempts.claim(job_id, request)

    @router.post("/{job_id}/events")
    def report(job_id: str, report: Report) -> ReportReply:
        return attempts.report(job_id, report)

    @router.post("/{job_id}/finish")
    def finish(job_id: str, finish: Finish) -> FineTuningJob:
        return attempts.finish(job_id, finish)

    return router


def _labels(request: Request) -> dict[str, str]:
    """`metadata[key]=value` in the query, as OpenAI's clients send it."""
    return {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }
