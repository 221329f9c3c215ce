"""What the inference host asks of an orchestrator, in memory: names, leases, beats."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI

from sage_contracts.devices import LeaseReply, LeaseRequest, ReleaseRequest
from sage_contracts.errors import DeviceBusyError, ModelNotFoundError
from sage_contracts.models import ResolvedModel
from sage_contracts.workers import WorkerBeat
from sage_servicekit.app import create_app, require_internal
from sage_servicekit.settings import ServiceSettings


@dataclass
class Registry:
    """Also a ledger: its two async methods are what the host's loop needs of one."""

    models: dict[str, ResolvedModel] = field(default_factory=dict)
    leases: dict[str, LeaseRequest] = field(default_factory=dict)
    busy_with: str = ""
    """Not empty: no new lease is granted."""
    capacity: int | None = None
    """So many leases at once; more are refused."""
    orders_yield: bool = False
    beats: list[WorkerBeat] = field(default_factory=list)
    resolved: int = 0

    def add(self, name: str, base: Path | str, adapter: Path | None = None) -> None:
        self.models[name] = ResolvedModel(
            id=name, base_model=str(base), adapter_path=str(adapter) if adapter else None
        )

    async def lease(self, request: LeaseRequest) -> LeaseReply:
        is_new = request.holder not in self.leases
        is_full = self.capacity is not None and len(self.leases) >= self.capacity
        if is_new and (self.busy_with or is_full):
            who = self.busy_with or ", ".join(lease.label for lease in self.leases.values())
            raise DeviceBusyError(f"device busy: {who}, about 12 min", retry_after_s=30)
        self.leases[request.holder] = request
        return LeaseReply(ttl_s=30, must_yield=self.orders_yield and request.is_idle)

    async def release(self, holder: str) -> None:
        self.leases.pop(holder, None)


def build_app(registry: Registry, home: Path) -> FastAPI:
    app = create_app("registry", ServiceSettings(home_dir=home))
    router = APIRouter(dependencies=[Depends(require_internal)])

    @router.get("/internal/models/resolve")
    def resolve(name: str) -> ResolvedModel:
        registry.resolved += 1
        if name not in registry.models:
            names = ", ".join(registry.models)
            raise ModelNotFoundError(f"There is no model {name!r}. There are: {names}.", param="model")
        return registry.models[name]

    @router.post("/internal/devices/lease")
    async def lease(request: LeaseRequest) -> LeaseReply:
        return await registry.lease(request)

    @router.post("/internal/devices/release", status_code=204)
    async def release(request: ReleaseRequest) -> None:
        await registry.release(request.holder)

    @router.post("/internal/workers/beat")
    def beat(message: WorkerBeat) -> dict[str, str]:
        registry.beats.append(message)
        return {}

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "created": 0} for name in registry.models]
        return {"object": "list", "data": data}

    app.include_router(router)
    return app
