"""What the inference host says about its engines."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class EngineStatus(BaseModel):
    """One engine: a base model with the adapters loaded into it."""

    engine_id: str
    kind: Literal["vllm", "transformers"]
    base_model: str
    state: EngineState
    phase: str = ""
    adapters: list[str] = []
    busy_requests: int = 0
    idle_s: float = 0
    pid: int | None = None
    error: str | None = None


class HostStatus(BaseModel):
    """GET /v1/sage/engines on the inference host (and, relayed, on the gateway)."""

    device: str
    engine_kind: str
    keep_alive_s: float
    engines: list[EngineStatus]
