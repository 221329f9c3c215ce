"""Engines without processes, for the host's loop: the test decides when each start, load and end happens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from sage_contracts.errors import EngineFailedError, SageError
from sage_inference.engine_process import Launch
from sage_inference.engines import Plan
from sage_inference.fit import Kind
from sage_inference.models import Adapter, BaseModel
from sage_servicekit.machine import Device


class MemoryEngine:
    """A RunningEngine that is ready, failed, dead or loaded when the test says so."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        self.is_ready = asyncio.Event()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.start_error: SageError | None = None
        self.load_error: Exception | None = None
        self.loaded: list[str] = []
        self.stops = 0
        self.url = "http://127.0.0.1:1"
        self.pid = 1
        self.phase = "loading weights"
        self.lost_its_port = False

    @property
    def client(self) -> httpx.AsyncClient:
        raise NotImplementedError("nothing is relayed to an engine without a process")

    def fail(self, error: SageError) -> None:
        self.start_error = error
        self.is_ready.set()

    async def wait_ready(self) -> None:
        await self.is_ready.wait()
        if self.start_error is not None:
            raise self.start_error

    def failure(self, what: str) -> EngineFailedError:
        return EngineFailedError(f"The engine {what}: because the test said so")

    async def load_adapter(self, adapter: Adapter) -> None:
        await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error
        self.loaded.append(adapter.name)

    async def unload_adapter(self, name: str) -> None:
        self.loaded.remove(name)

    async def stop(self) -> None:
        self.stops += 1
        self.exited.set()


@dataclass
class MemoryFactory:
    """Hands out engines and keeps them, in the order of their starts."""

    kind: Kind = "vllm"
    device: Device = field(default_factory=lambda: Device("cpu", 2**34))
    starts_ready: bool = True
    engines: list[MemoryEngine] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def plan(self, base: BaseModel, rank: int) -> Plan:
        launch = Launch(base.served_name, lambda _: [], {}, 1, 1, 1, 1, Path("log"), Path("records"))
        plan = Plan(launch, needed_bytes=1000, least_bytes=0, max_rank=max(rank, 16))
        self.plans.append(plan)
        return plan

    async def start(self, plan: Plan, used_bytes: int | None) -> MemoryEngine:
        engine = MemoryEngine()
        if self.starts_ready:
            engine.is_ready.set()
        self.engines.append(engine)
        return engine


def base(name: str = "tiny") -> BaseModel:
    return BaseModel(f"/models/{name}", f"base:{name}", True, 1000, 512, 256)
