"""/v1/sage/devices for people, /internal/devices for the inference host."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from sage_contracts.devices import DeviceState, LeaseReply, LeaseRequest, ReleaseRequest
from sage_contracts.paging import ListPage
from sage_orchestrator.devices.service import DeviceService
from sage_servicekit.app import require_internal


def make_router(service: DeviceService) -> APIRouter:
    router = APIRouter(tags=["devices"])
    internal = APIRouter(prefix="/internal/devices", dependencies=[Depends(require_internal)])

    @router.get("/v1/sage/devices")
    def list_devices() -> ListPage[DeviceState]:
        return ListPage(data=service.states())

    @internal.post("/lease")
    def lease(request: LeaseRequest) -> LeaseReply:
        return service.lease(request)

    @internal.post("/release", status_code=204)
    def release(request: ReleaseRequest) -> None:
        service.release(request)

    router.include_router(internal)
    return router
