"""Request bodies, looked at before any service reads them: size, pace, and text that cannot be written."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

from starlette.requests import ClientDisconnect, Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage_contracts.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    SageError,
    ServiceUnavailableError,
)
from sage_servicekit.errors import error_response

_HIGH, _LOW = rb"[89abAB][0-9a-fA-F]{2}", rb"[c-fC-F][0-9a-fA-F]{2}"
_SURROGATES = re.compile(rb"\\u[dD](?:%b\\u[dD]%b|(%b|%b))" % (_HIGH, _LOW, _HIGH, _LOW))
"""Both halves of a character, else one, in the group."""
_RAW_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
"""No character of UTF-8 begins so, but Python reads JSON with one as if it were text."""

LARGEST_AT_ONCE = 8
"""Bodies of the largest size that one process takes in at the same time, together with all smaller ones."""
PACE = 10
"""The whole of a body that is no upload may take as long as so many silences."""
_SMALL_BYTES = 64 * 1024
_AT_ONCE_BYTES = 256 * 1024  # what is searched without a thread: a millisecond


class CheckedBodies:
    """Refuses a body of more than `max_bytes`, that stops for `silence_s`, or with half a character in it.

    What is sent to `uploads`, paths as of routes, is not read here: who reads it there bounds it as it comes.

    Half a character is a surrogate without its other half, as of an emoji that somebody cut in two, or that
    was encoded half by half (CESU-8): JSON can say it, and nothing can store it or send it on.
    """

    def __init__(
        self, app: ASGIApp, source: str, max_bytes: int, uploads: Iterable[str], silence_s: float
    ) -> None:
        self._app = app
        self._source = source
        self._max_bytes = max_bytes
        self._uploads = [compile_path(path)[0] for path in uploads]
        self._silence_s = silence_s
        self._coming_bytes = 0
        """Of all bodies that are being read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        receive = _impatient(receive, self._silence_s)
        if any(path.match(scope["path"]) for path in self._uploads):
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
        try:
            async with asyncio.timeout(PACE * self._silence_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message
                    self._take(content, message.get("body", b""))
                    if not message.get("more_body", False):
                        break
            has_half = (
                has_half_character(content)
                if len(content) <= _AT_ONCE_BYTES
                else await asyncio.to_thread(has_half_character, content)
            )
        except TimeoutError as error:
            raise InvalidRequestError(
                f"The body was not whole after {PACE * self._silence_s:g} s (SAGE_CLIENT_SILENCE_S)."
            ) from error
        finally:
            self._coming_bytes -= len(content)
        if has_half:
            raise InvalidRequestError(
                "The body holds half a character, such as \\ud83d alone: an emoji was cut in two. Cut text "
                "between characters, and encode it as UTF-8."
            )
        return {"type": "http.request", "body": bytes(content), "more_body": False}

    def _take(self, content: bytearray, chunk: bytes) -> None:
        """Raises: PayloadTooLargeError, ServiceUnavailableError where this process has no room for it."""
        content += chunk
        self._coming_bytes += len(chunk)
        if len(content) > self._max_bytes:
            raise PayloadTooLargeError(f"The body is larger than {self._max_bytes} bytes.")
        # The last place is for small ones: whoever sends many large bodies must not keep a chat out.
        places = LARGEST_AT_ONCE if len(content) <= _SMALL_BYTES else LARGEST_AT_ONCE - 1
        if self._coming_bytes > places * self._max_bytes:
            raise ServiceUnavailableError(
                "Too many large requests are being sent at once; try again.", retry_after_s=1
            )


def _impatient(receive: Receive, silence_s: float) -> Receive:
    """`receive`, which waits no longer than that for the next bytes of a body. Raises: InvalidRequestError.

    What follows the body, the client's leaving, has no deadline: answers may take as long as they like.
    """
    is_whole = False

    async def received() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            async with asyncio.timeout(silence_s):
                message = await receive()
        except TimeoutError as error:
            raise InvalidRequestError(
                f"Nothing more of the body came for {silence_s:g} s (SAGE_CLIENT_SILENCE_S)."
            ) from error
        is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return received


async def whole_body(request: Request) -> bytes:
    """For routes that parse it themselves. Raises: InvalidRequestError where the client left half-way."""
    try:
        return await request.body()
    except ClientDisconnect as error:
        raise InvalidRequestError("The request ended before its body did.") from error


def has_half_character(content: bytes | bytearray) -> bool:
    """Whether JSON has an escaped surrogate without its other half, or bytes that stand for one."""
    if _RAW_SURROGATE.search(content):
        return True
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
