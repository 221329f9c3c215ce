"""How often engines failed of late, and what follows. Only the host's loop changes it."""

from __future__ import annotations

from sage_contracts.errors import EngineFailedError
from sage_inference import policy
from sage_inference.records import Failure


class Failures:
    """The last failures of every engine, as many as are allowed within the window."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[Failure]] = {}
        self._unresolved: dict[str, Failure] = {}

    def add(self, failure: Failure) -> None:
        failures = self._by_key.setdefault(failure.engine.key, [])
        failures.append(failure)
        del failures[: -policy.CRASHES_ALLOWED]
        self._unresolved[failure.engine.key] = failure

    def resolve(self, key: str) -> None:
        """The engine works again. What was before still counts at the gate."""
        self._unresolved.pop(key, None)

    def gate(self, key: str, now: float) -> policy.Gate:
        """Whether the engine may start again, and after how long."""
        return policy.restart_gate([failure.at for failure in self._by_key.get(key, [])], now)

    def refusal(self, key: str, wait_s: float) -> EngineFailedError:
        """What those hear who ask for an engine that failed too often."""
        minutes = policy.CRASH_WINDOW_S / 60
        return EngineFailedError(
            f"{self._by_key[key][-1].error.message} — it failed {policy.CRASHES_ALLOWED} times within "
            f"{minutes:.0f} minutes and is not tried again for {wait_s:.0f} s.",
            retry_after_s=wait_s,
        )

    def latest(self, now: float) -> list[Failure]:
        """Each engine's last failure within the window, unless it has worked since."""
        since = now - policy.CRASH_WINDOW_S
        return [failure for failure in self._unresolved.values() if failure.at > since]
