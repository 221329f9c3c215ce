"""/internal/workers: beats, and who is there."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from sage_contracts.paging import ListPage
from sage_contracts.workers import WorkerBeat, WorkerLeaves, WorkerSeen
from sage_orchestrator.workers.service import WorkerService
from sage_servicekit.app import require_internal


def make_router(service: WorkerService) -> APIRouter:
    router = APIRouter(prefix="/internal/workers", dependencies=[Depends(require_internal)], tags=["workers"])

    @router.post("/beat", status_code=204)
    def beat(beat: WorkerBeat) -> None:
        service.beat(beat)

    @router.post("/leave", status_code=204)
    def leave(message: WorkerLeaves) -> None:
        service.forget(message.worker_id)

    @router.get("")
    def list_workers() -> ListPage[WorkerSeen]:
        return ListPage(data=service.everyone())

    return router
