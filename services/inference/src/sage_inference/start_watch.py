"""Whether a starting engine gets on: a slow machine needs minutes, and one that hangs is not worth them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Of a core. A vLLM that waits for requests needs 0.013; one thread among sixty on two cores gets this much.
_LEAST_SHARE = 0.03


@dataclass(frozen=True)
class Work:
    """What an engine has done so far."""

    lines: int
    """That it logged."""
    cpu_s: float
    """Of all its processes; less than before when one of them ended."""


class StartWatch:
    """Looks every `stall_s` whether the engine has logged or computed anything since."""

    def __init__(
        self, stall_s: float, done: Callable[[], Work], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stall_s = stall_s
        self._done = done
        self._clock = clock
        self._seen = done()
        self._seen_at = clock()

    def is_stalled(self) -> bool:
        """To be asked often; it looks when it is time to."""
        if self._clock() - self._seen_at < self._stall_s:
            return False
        before, self._seen = self._seen, self._done()
        self._seen_at = self._clock()
        has_computed = abs(self._seen.cpu_s - before.cpu_s) >= _LEAST_SHARE * self._stall_s
        return self._seen.lines == before.lines and not has_computed
