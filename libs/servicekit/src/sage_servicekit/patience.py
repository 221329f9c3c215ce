"""Connections that take up a place and ask nothing: uvicorn's protocol, with an end to its patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from sage_servicekit.bodies import PACE


def patient_for(silence_s: float) -> type[asyncio.Protocol]:
    """A protocol for uvicorn that closes a connection without a whole head of a request in that time.

    After an answer, the rest of a body that nobody reads and the head of the next request together may take
    `PACE` times as long. A request that is being answered is never cut off.
    """

    class Patient(_Deadlines):
        first_s = silence_s
        next_s = PACE * silence_s

    return Patient


class _Deadlines(AutoHTTPProtocol):  # type: ignore[misc, valid-type] # which of two, uvicorn finds out
    first_s: float
    next_s: float
    # uvicorn's, the same in both.
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any
    timeout_keep_alive: float
    timeout_keep_alive_task: asyncio.TimerHandle | None
    timeout_keep_alive_handler: Callable[[], None]

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_request(self.first_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn's own timer ends with the next byte, though nothing may follow it.
        if self._is_idle() and self.cycle is not None and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request(self.next_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_request(self, within_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(within_s, self._close_unless_asked)

    def _close_unless_asked(self) -> None:
        if self._is_idle():
            self.transport.close()
