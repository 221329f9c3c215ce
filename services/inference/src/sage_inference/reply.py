"""Writing an answer whose first byte may come before it is known whether there will be one."""

from __future__ import annotations

from starlette.types import Send

from sage_contracts.errors import ErrorBody, SageError
from sage_servicekit.errors import headers_of, status_of

EVENT_STREAM = "text/event-stream; charset=utf-8"


class ReplyWriter:
    """One HTTP response. An error before the start is an HTTP error; after it, an event of the stream."""

    def __init__(self, send: Send, source: str) -> None:
        self._send = send
        self._source = source
        self._is_started = False

    async def start(self, status: int, content_type: str, headers: dict[str, str] | None = None) -> None:
        """Send the head, unless comments were sent before."""
        if self._is_started:
            return
        self._is_started = True
        pairs = {"content-type": content_type, **(headers or {})}
        if content_type.startswith("text/event-stream"):
            # Reverse proxies would collect events until there is enough to send.
            pairs |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        raw = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in pairs.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def comment(self, text: str) -> None:
        """An SSE comment: keeps the connection awake, and says to those who look what is going on."""
        await self.start(200, EVENT_STREAM)
        await self.write(f": {text}\n\n".encode())

    async def whole(
        self, status: int, content_type: str, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        await self.start(status, content_type, {"content-length": str(len(content)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, error: SageError) -> None:
        """End with one of our errors."""
        await self.refuse(status_of(error), error.to_body(self._source), headers_of(error))

    async def refuse(self, status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> None:
        """End with an error body: as the response, or in the stream that has begun."""
        content = body.model_dump_json().encode()
        if not self._is_started:
            await self.whole(status, "application/json", content, headers)
            return
        # The blank line first ends an event that the engine may have left half-sent.
        await self.write(b"\n\ndata: " + content + b"\n\ndata: [DONE]\n\n")
        await self.end()
