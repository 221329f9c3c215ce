"""Request bodies, looked at before any service reads them: their size, and text that cannot be written."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage_contracts.errors import InvalidRequestError, PayloadTooLargeError, SageError
from sage_servicekit.errors import error_response

_HIGH, _LOW = rb"[89abAB][0-9a-fA-F]{2}", rb"[c-fC-F][0-9a-fA-F]{2}"
_SURROGATES = re.compile(rb"\\u[dD](?:%b\\u[dD]%b|(%b|%b))" % (_HIGH, _LOW, _HIGH, _LOW))
"""Both halves of a character, else one, in the group."""

_AT_ONCE_BYTES = 256 * 1024  # what is searched without a thread: a millisecond


class CheckedBodies:
    """Refuses a body of more than `max_bytes`, or with half a character in it.

    What is sent to `uploads`, paths as of routes, passes untouched: who reads it there bounds it as it comes.

    Half a character is a surrogate without its other half, as of an emoji that somebody cut in two: JSON can
    say it, and nothing can store it or send it on.
    """

    def __init__(self, app: ASGIApp, source: str, max_bytes: int, uploads: Iterable[str]) -> None:
        self._app = app
        self._source = source
        self._max_bytes = max_bytes
        self._uploads = [compile_path(path)[0] for path in uploads]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or any(path.match(scope["path"]) for path in self._uploads):
            await self._app(scope, receive, send)
            return
        try:
            waiting = [await self._read(receive)]
        except SageError as error:
            await error_response(error, self._source)(scope, receive, send)
            return

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> Message:
        """The whole body as one message; the last one where the client left. Raises: SageError."""
        content = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            content += message.get("body", b"")
            if len(content) > self._max_bytes:
                raise PayloadTooLargeError(f"The body is larger than {self._max_bytes} bytes.")
            if not message.get("more_body", False):
                break
        is_large = len(content) > _AT_ONCE_BYTES
        if await asyncio.to_thread(has_half_character, content) if is_large else has_half_character(content):
            raise InvalidRequestError(
                "The body holds half a character, such as \\ud83d alone: an emoji was cut in two. Cut text "
                "between characters."
            )
        return {"type": "http.request", "body": bytes(content), "more_body": False}


def has_half_character(content: bytes | bytearray) -> bool:
    """Whether JSON has an escaped surrogate without its other half."""
    position = 0
    while found := _SURROGATES.search(content, position):
        before = content[position : found.start()]
        if (len(before) - len(before.rstrip(b"\\"))) % 2:
            position = found.start() + 2  # its backslash is itself escaped: this is text
        elif found[1]:
            return True
        else:
            position = found.end()
    return False
