"""Time as an argument, so that leases and backoffs are tested without waiting."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch."""
