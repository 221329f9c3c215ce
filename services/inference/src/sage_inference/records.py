"""What the host remembers of engines and of those who wait for them. Only the host's loop changes these."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from sage_contracts.devices import LeaseReply, LeaseRequest
from sage_contracts.errors import EngineFailedError, SageError
from sage_contracts.inference import EngineState, EngineStatus
from sage_inference.engines import Plan
from sage_inference.fit import Kind
from sage_inference.models import Adapter, BaseModel, Wanted
from sage_inference.policy import AdapterView, EngineView
from sage_servicekit.machine import Device


class RunningEngine(Protocol):
    """A started engine child. `stop` is called exactly once, whatever happened before."""

    exited: asyncio.Event

    @property
    def url(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def lost_its_port(self) -> bool: ...
    @property
    def client(self) -> httpx.AsyncClient: ...
    async def wait_ready(self) -> None: ...
    def failure(self, what: str) -> EngineFailedError: ...
    async def load_adapter(self, adapter: Adapter) -> None: ...
    async def unload_adapter(self, name: str) -> None: ...
    async def stop(self) -> None: ...


class Factory(Protocol):
    """Plans and starts engines of one kind on one device."""

    @property
    def kind(self) -> Kind: ...
    @property
    def device(self) -> Device: ...
    def plan(self, base: BaseModel, rank: int) -> Plan: ...
    async def start(self, plan: Plan, used_bytes: int | None) -> RunningEngine: ...


class Ledger(Protocol):
    """Who may use which device: the orchestrator, seen from here."""

    async def lease(self, request: LeaseRequest) -> LeaseReply: ...
    async def release(self, holder: str) -> None: ...


@dataclass
class AdapterSlot:
    is_loaded: bool = False
    busy: int = 0
    last_used: float = 0


@dataclass(eq=False)
class Engine:
    """One engine from the decision to start it until no process of it is left."""

    id: str
    base: BaseModel
    plan: Plan
    last_used: float
    """Until it is ready, when its start began."""
    state: EngineState = EngineState.STARTING
    process: RunningEngine | None = None
    busy: int = 0
    """Requests and adapter loads under way."""
    slots: dict[str, AdapterSlot] = field(default_factory=dict)
    sessions: dict[str, float] = field(default_factory=dict)
    """When each chat session was last answered."""
    has_lease: bool = False
    is_draining: bool = False
    must_yield: bool = False
    stop_requested: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        return self.base.location

    @property
    def phase(self) -> str:
        if self.state is not EngineState.STARTING:
            return ""
        return self.process.phase if self.process else "waiting for the device"

    @property
    def is_dead(self) -> bool:
        """Its process ended by itself, and the loop has not heard of it yet."""
        return self.process is not None and self.process.exited.is_set()

    def progress(self, label: str) -> str:
        """What a request that waits for `label` waits for, for people."""
        if self.state is EngineState.STARTING:
            return f"starting engine ({self.phase})"
        if self.state is EngineState.STOPPING:
            return "waiting for the previous engine to stop"
        return f"loading {label}"

    def starting_s(self, now: float) -> float:
        """How long its start has taken so far; 0 once that is over."""
        return now - self.last_used if self.state is EngineState.STARTING else 0

    def view(self) -> EngineView:
        slots = {
            name: AdapterView(slot.is_loaded, slot.busy > 0, slot.last_used)
            for name, slot in self.slots.items()
        }
        return EngineView(
            key=self.key,
            state=EngineState.STOPPING if self.is_dead else self.state,
            is_busy=self.busy > 0,
            last_used=self.last_used,
            max_rank=self.plan.max_rank,
            adapters=slots,
            is_draining=self.is_draining,
            must_yield=self.must_yield,
        )

    def status(self, kind: Kind, now: float) -> EngineStatus:
        is_idle = self.state is EngineState.READY and self.busy == 0
        return EngineStatus(
            engine_id=self.id,
            kind=kind,
            base_model=self.base.served_name,
            state=self.state,
            phase=self.phase,
            adapters=[name for name, slot in self.slots.items() if slot.is_loaded],
            busy_requests=self.busy,
            idle_s=round(now - self.last_used, 1) if is_idle else 0,
            pid=self.process.pid if self.process else None,
        )

    def lease_request(self, device: Device) -> LeaseRequest:
        names = ", ".join(self.slots) or self.base.served_name
        return LeaseRequest(
            holder=f"engine:{self.id}",
            purpose="inference",
            device=device.name,
            bytes=self.plan.needed_bytes,
            total_bytes=device.total_bytes,
            is_idle=self.state is EngineState.READY and self.busy == 0,
            label=f"serving {names}",
        )


@dataclass(frozen=True)
class Failure:
    """A start that failed, or a crash."""

    at: float
    engine: Engine
    error: SageError

    def status(self, kind: Kind) -> EngineStatus:
        return EngineStatus(
            engine_id=self.engine.id,
            kind=kind,
            base_model=self.engine.base.served_name,
            state=EngineState.FAILED,
            error=self.error.message,
        )


@dataclass(eq=False)
class Grant:
    """The right of one request to use an engine; give it back with `Host.release`."""

    engine: Engine
    process: RunningEngine
    model: str
    """The name that the engine knows it by."""
    slot: AdapterSlot | None

    def give_back(self, now: float) -> None:
        self.engine.busy -= 1
        self.engine.last_used = now
        if self.slot is not None:
            self.slot.busy -= 1
            self.slot.last_used = now


@dataclass(eq=False)
class Waiter:
    wanted: Wanted
    session: str
    future: asyncio.Future[Grant]


@dataclass(frozen=True)
class Arrived:
    waiter: Waiter


@dataclass(frozen=True)
class Left:
    waiter: Waiter


@dataclass(frozen=True)
class Released:
    grant: Grant


@dataclass(frozen=True)
class Ready:
    engine: Engine


@dataclass(frozen=True)
class Gone:
    """No process of the engine is left and its lease is given back."""

    engine: Engine
    failure: SageError | None


@dataclass(frozen=True)
class AdapterIn:
    engine: Engine
    name: str
    failure: SageError | None


@dataclass(frozen=True)
class AdapterOut:
    engine: Engine
    name: str


@dataclass(frozen=True)
class YieldOrder:
    engine: Engine


@dataclass(frozen=True)
class SessionEnded:
    key: str
    session: str
    may_stop: bool
    stopped: asyncio.Future[bool]


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Arrived | Left | Released | Ready | Gone | AdapterIn | AdapterOut | YieldOrder | SessionEnded | Tick
