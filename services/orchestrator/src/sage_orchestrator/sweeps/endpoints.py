"""/v1/sage/sweeps: an extension beside OpenAI's API; the jobs of a sweep are ordinary ones."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from sage_contracts.paging import ListPage
from sage_contracts.sweeps import CreateSweepRequest, Sweep
from sage_orchestrator.sweeps.service import SweepService


def make_router(service: SweepService) -> APIRouter:
    router = APIRouter(prefix="/v1/sage/sweeps", tags=["sweeps"])

    @router.post("")
    def create(request: CreateSweepRequest) -> Sweep:
        return service.create(request)

    @router.get("")
    def list_sweeps(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        name: str | None = None,
    ) -> ListPage[Sweep]:
        return service.list_sweeps(after=after, limit=limit, name=name)

    @router.get("/{sweep_id}")
    def retrieve(sweep_id: str) -> Sweep:
        return service.get(sweep_id)

    @router.post("/{sweep_id}/cancel")
    def cancel(sweep_id: str) -> Sweep:
        return service.cancel(sweep_id)

    return router
