"""Time as an argument, so that leases and backoffs are tested without waiting."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since the epoch."""
_WORTH_NOTICING_S = 3.0
"""Reports come every two seconds: a lease outlives smaller jumps by far."""


class Jumps:
    """Notices that `clock` was set, or that the machine slept, by a `steady` one, which does neither."""

    def __init__(self, clock: Clock, steady: Clock) -> None:
        self._clock = clock
        self._steady = steady
        self._lead = self._lead_now()

    def since_last(self) -> float:
        """Seconds that the clock has jumped since it was last asked, negative ones backwards; 0 for few."""
        lead = self._lead_now()
        jump, self._lead = lead - self._lead, lead
        return jump if abs(jump) >= _WORTH_NOTICING_S else 0.0

    def _lead_now(self) -> float:
        return self._clock() - self._steady()
