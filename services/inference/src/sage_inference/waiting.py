"""Who waits for an engine. Only the host's loop changes it."""

from __future__ import annotations

from collections.abc import Iterator

from sage_contracts.errors import SageError
from sage_inference.records import Waiter


class WaitingRoom:
    """Requests without an engine, in the order in which they came."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def __iter__(self) -> Iterator[Waiter]:
        """Those who wait now; they may leave meanwhile."""
        return iter(list(self._waiters))

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self._waiters

    def enter(self, waiter: Waiter) -> None:
        self._waiters.append(waiter)

    def leave(self, waiter: Waiter) -> None:
        self._waiters.remove(waiter)

    def keys(self) -> set[str]:
        """The engines that are waited for."""
        return {waiter.wanted.base.location for waiter in self._waiters}

    def highest_rank(self, key: str) -> int:
        """Of the adapters that wait for that engine. Somebody does."""
        return max(waiter.wanted.rank for waiter in self._waiters if waiter.wanted.base.location == key)

    def fail(self, waiter: Waiter, error: SageError) -> None:
        self.leave(waiter)
        if not waiter.future.done():
            waiter.future.set_exception(error)

    def fail_all(self, error: SageError) -> None:
        for waiter in self:
            self.fail(waiter, error)

    def fail_engine(self, key: str, error: SageError, adapter: str | None = None) -> None:
        """Fail who waits for that engine (and that adapter, when named)."""
        for waiter in self:
            wanted = waiter.wanted
            is_meant = adapter is None or (wanted.adapter is not None and wanted.adapter.name == adapter)
            if wanted.base.location == key and is_meant:
                self.fail(waiter, error)
