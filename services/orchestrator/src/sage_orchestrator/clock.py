"""Time as an argument, so that leases and backoffs are tested without waiting."""

from __future__ import annotations

import math
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


class Rounds:
    """Knows by a `steady` clock whether rounds that come often have come lately, and ended well."""

    def __init__(self, steady: Clock, longest_gap_s: float) -> None:
        self._steady = steady
        self._longest_gap_s = longest_gap_s
        self._ended_at = -math.inf

    @property
    def have_gap(self) -> bool:
        """Whether the last one failed or is too long ago; true before the first."""
        return self._steady() - self._ended_at > self._longest_gap_s

    def begin(self) -> None:
        self._ended_at = -math.inf

    def end(self) -> None:
        self._ended_at = self._steady()
