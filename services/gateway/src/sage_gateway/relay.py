"""From a reply to the client's connection: bytes as they come, and an end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage_chat.backend import Reply

Result = TypeVar("Result")

# nginx's number for it. Nobody reads it but the metrics.
CLIENT_LEFT_STATUS = 499


class ClientLeftError(Exception):
    """The client closed its connection; the work for it was cancelled."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result. Raises: ClientLeftError, after cancelling the work and waiting for its end."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class RelayResponse(Response):
    """Sends a reply chunk by chunk, unbuffered. When the client leaves, the upstream is closed at once."""

    def __init__(self, reply: Reply, extra_headers: dict[str, str] | None = None) -> None:
        self._reply = reply
        self.status_code = reply.status
        self.background = None
        headers = {**reply.headers, **(extra_headers or {})}
        if reply.is_stream:
            headers.setdefault("cache-control", "no-cache")
            headers["x-accel-buffering"] = "no"  # reverse proxies would collect events
        self.raw_headers = [
            (key.lower().encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._reply):
            try:
                await unless_client_leaves(receive, self._send(send))
            except (ClientLeftError, OSError):
                return

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._reply.body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
