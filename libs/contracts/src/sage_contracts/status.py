"""What `sage status` shows: GET /v1/sage/status on the gateway."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class PartStatus(BaseModel):
    name: str
    state: Literal["up", "down"]
    detail: dict[str, Any] = Field(default_factory=dict)


class StackStatus(BaseModel):
    parts: list[PartStatus]
