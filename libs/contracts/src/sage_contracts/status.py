"""What `sage status` shows: GET /v1/sage/status on the gateway."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

WRONG_SETTING = "Wrong setting: "
"""How the log of a part ends that its environment keeps from starting; `sage up` shows that line alone."""


class PartStatus(BaseModel):
    name: str
    state: Literal["up", "down"]
    detail: dict[str, Any] = Field(default_factory=dict)


class StackStatus(BaseModel):
    parts: list[PartStatus]
