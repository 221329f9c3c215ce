"""From a reply to the client's connection: bytes as they come, and an end when the client leaves."""

from __future__ import annotations

from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage_chat.backend import Reply
from sage_servicekit.connection import ClientLeftError, unless_client_leaves

# nginx's number for it. Nobody reads it but the metrics.
CLIENT_LEFT_STATUS = 499


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
