"""/v1/sage/models/{name}/merge and /v1/sage/merges for people, /internal/merges for the merger."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from sage_contracts.models import MergeJob, MergeRequest
from sage_contracts.workers import ClaimRequest, MergeClaim, MergeFinish, MergeReport, ReportReply
from sage_orchestrator.merges.service import MergeService
from sage_servicekit.app import require_internal


def make_router(service: MergeService) -> APIRouter:
    router = APIRouter(tags=["merges"])
    internal = APIRouter(prefix="/internal/merges", dependencies=[Depends(require_internal)])

    @router.post("/v1/sage/models/{model}/merge")
    def create(model: str, request: MergeRequest | None = None) -> MergeJob:
        return service.create(model, request or MergeRequest())

    @router.get("/v1/sage/merges/{merge_id}")
    def retrieve(merge_id: str) -> MergeJob:
        return service.get(merge_id)

    @internal.post("/{merge_id}/claim")
    def claim(merge_id: str, request: ClaimRequest) -> MergeClaim:
        return service.claim(merge_id, request)

    @internal.post("/{merge_id}/events")
    def report(merge_id: str, report: MergeReport) -> ReportReply:
        return service.report(merge_id, report)

    @internal.post("/{merge_id}/finish")
    def finish(merge_id: str, finish: MergeFinish) -> MergeJob:
        return service.finish(merge_id, finish)

    router.include_router(internal)
    return router
