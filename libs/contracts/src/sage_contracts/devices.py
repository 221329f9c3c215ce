"""Device leases: who may allocate where, so that training and serving never meet in an OOM."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Purpose = Literal["training", "inference"]


class LeaseRequest(BaseModel):
    """POST /internal/devices/lease. Asking again with the same holder renews or resizes."""

    model_config = ConfigDict(extra="forbid")

    holder: str
    """Unique per allocation: `train:<job id>`, `engine:<engine id>`."""
    purpose: Purpose
    device: str
    bytes: int
    total_bytes: int
    """What the device has, as the asker sees it."""
    is_idle: bool = False
    """An idle holder may be asked to yield."""
    label: str = ""
    """For people: `training code`, `serving code@3`."""


class LeaseReply(BaseModel):
    """Granted, or DeviceBusyError. `must_yield` asks an idle holder to stop and release."""

    model_config = ConfigDict(extra="forbid")

    ttl_s: float
    must_yield: bool = False


class ReleaseRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    holder: str


class DeviceLease(BaseModel):
    holder: str
    purpose: Purpose
    bytes: int
    label: str
    expires_at: float
    is_idle: bool


class DeviceState(BaseModel):
    """GET /v1/sage/devices, one per device."""

    device: str
    total_bytes: int
    leased_bytes: int
    leases: list[DeviceLease]
