"""From a request to an engine's answer: parked while the engine starts, then the engine's own bytes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sage_contracts.errors import (
    EngineFailedError,
    EngineStartingError,
    ErrorBody,
    ErrorDetail,
    InvalidRequestError,
    SageError,
    UpstreamError,
    UpstreamTimeoutError,
)
from sage_inference.finder import Finder
from sage_inference.host import Host
from sage_inference.models import Wanted
from sage_inference.records import Grant
from sage_inference.reply import ReplyWriter
from sage_inference.settings import InferenceSettings
from sage_servicekit.connection import ClientLeftError, unless_client_leaves

_CONNECT_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 10.0
# After a connection broke: how long the exit of its engine may take to be noticed.
_EXIT_NOTICE_S = 2.0
# The gateway's prefix, for those who talk to this service directly.
_PREFIX = "finetune/"
_CODES = {
    400: "invalid_request",
    404: "model_not_found",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
}


class EngineGoneError(EngineFailedError):
    """The engine was not there any more when a request was sent to it: nothing was answered yet."""


@dataclass(frozen=True)
class Call:
    """A request body: what we read of it, and all of it."""

    model: str
    is_stream: bool
    fields: dict[str, Any]

    @classmethod
    def parse(cls, body: bytes) -> Call:
        """Raises: InvalidRequestError."""
        try:
            fields = json.loads(body)
        except ValueError as error:
            raise InvalidRequestError(f"The body is not JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise InvalidRequestError("The body is not a JSON object.")
        model = fields.get("model")
        if not isinstance(model, str) or not model:
            raise InvalidRequestError("model: name the model to ask, for example 'code'.", param="model")
        return cls(model.removeprefix(_PREFIX), fields.get("stream") is True, fields)

    @property
    def wants_tools(self) -> bool:
        """Whether the answer may be a call of a tool."""
        return bool(self.fields.get("tools")) and self.fields.get("tool_choice") != "none"

    def for_engine(self, model: str, turn_end_ids: Sequence[int] = ()) -> bytes:
        """The same request with the name that the engine knows, and where the model's answers end."""
        fields = self.fields | {"model": model}
        asked = fields.get("stop_token_ids") or []
        # What is no list is the engine's to refuse; and who ignores the base's own end ignores these.
        if turn_end_ids and isinstance(asked, list) and not fields.get("ignore_eos"):
            fields["stop_token_ids"] = [*asked, *(end for end in turn_end_ids if end not in asked)]
        return json.dumps(fields, ensure_ascii=False).encode()


class Answer(Response):
    """Waits for the engine and relays its answer; ends all of it when the client leaves."""

    def __init__(
        self,
        host: Host,
        finder: Finder,
        settings: InferenceSettings,
        path: str,
        call: Call,
        wanted: Wanted,
        session: str,
    ) -> None:
        self.background = None
        self.status_code = 200
        self.raw_headers = []
        self._host = host
        self._finder = finder
        self._merging = f"merging {wanted.label} first" if wanted.merge_reason else ""
        self._settings = settings
        self._path = path
        self._call = call
        self._wanted = wanted
        self._session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientLeftError):
            await unless_client_leaves(receive, self._answer(ReplyWriter(send, "inference")))

    async def _answer(self, reply: ReplyWriter) -> None:
        try:
            try:
                await self._try(reply)
            except EngineGoneError:
                # It died between two requests and this one noticed first; the next engine has not failed yet.
                await self._try(reply)
        except SageError as error:
            await reply.fail(error)

    async def _try(self, reply: ReplyWriter) -> None:
        async with self._granted(reply) as grant:
            await self._relay(grant, reply)

    @asynccontextmanager
    async def _granted(self, reply: ReplyWriter) -> AsyncIterator[Grant]:
        """Hold the engine, however the block ends."""
        acquiring = asyncio.create_task(self._acquire())
        try:
            yield await self._park(acquiring, reply)
        finally:
            acquiring.cancel()
            await asyncio.gather(acquiring, return_exceptions=True)
            if not acquiring.cancelled() and acquiring.exception() is None:
                self._host.release(acquiring.result())

    async def _acquire(self) -> Grant:
        if self._wanted.merge_reason is not None:
            self._wanted = await self._finder.merged(self._wanted, self._tell_of_merge)
            self._merging = ""
        return await self._host.acquire(self._wanted, self._session)

    def _tell_of_merge(self, progress: str) -> None:
        self._merging = progress

    async def _park(self, acquiring: asyncio.Task[Grant], reply: ReplyWriter) -> Grant:
        """Wait for the engine; a stream is told every few seconds what it waits for.

        Nothing is sent before the first of these comments, so an early refusal is an ordinary HTTP error.
        """
        settings, started = self._settings, time.monotonic()
        is_stream = self._call.is_stream
        limit_s = settings.stream_start_timeout_s if is_stream else settings.request_start_timeout_s
        while True:
            left_s = limit_s - (time.monotonic() - started)
            pause_s = min(settings.comment_interval_s, left_s) if is_stream else left_s
            await asyncio.wait({acquiring}, timeout=max(0, pause_s))
            if acquiring.done():
                return acquiring.result()
            waited_s = time.monotonic() - started
            progress = self._merging or self._host.progress(self._wanted)
            # Of who asks again, the engine may have been under way for longer than this request waits.
            taken_s = waited_s if self._merging else max(waited_s, self._host.starting_s(self._wanted))
            if waited_s >= limit_s:
                raise EngineStartingError(
                    f"{self._wanted.label} is not ready after {taken_s:.0f} s: {progress}. Try again soon.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            if is_stream:  # a timer may wake a moment too early: an answer in one piece has no room for this
                await reply.comment(f"{progress} {taken_s:.0f}s")

    async def _relay(self, grant: Grant, reply: ReplyWriter) -> None:
        client = grant.process.client
        if grant.process.exited.is_set():
            raise EngineGoneError(f"The engine for {self._wanted.label} is gone.")
        timeout = httpx.Timeout(self._settings.upstream_silence_s, connect=_CONNECT_TIMEOUT_S, pool=None)
        request = client.build_request(
            "POST",
            self._path,
            content=self._call.for_engine(grant.model, self._wanted.turn_end_ids),
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            timeout=timeout,
        )
        try:
            response = await client.send(request, stream=True)
            try:
                await self._pass_on(response, reply)
            finally:
                await response.aclose()
        except httpx.ConnectError as error:
            cause = await self._explain(grant, error)
            raise EngineGoneError(cause.message) from error
        except httpx.HTTPError as error:
            raise await self._explain(grant, error) from error

    async def _pass_on(self, response: httpx.Response, reply: ReplyWriter) -> None:
        if response.is_error:
            await reply.refuse(response.status_code, _error_of(response.status_code, await response.aread()))
            return
        content_type = response.headers.get("content-type", "application/json")
        if not self._call.is_stream:
            # Read whole first: an engine that dies halfway is then still an honest error.
            await reply.whole(response.status_code, content_type, await response.aread())
            return
        await reply.start(response.status_code, content_type)
        async for chunk in response.aiter_raw():
            await reply.write(chunk)
        await reply.end()

    async def _explain(self, grant: Grant, error: httpx.HTTPError) -> SageError:
        """Why the engine broke off: its own last words where it is dead."""
        try:
            async with asyncio.timeout(_EXIT_NOTICE_S):
                await grant.process.exited.wait()
        except TimeoutError:
            is_late = isinstance(error, httpx.TimeoutException)
            what = "sent nothing for too long" if is_late else "broke off"
            # Late work may be under way still, and asked for again it would be done again.
            kind = UpstreamTimeoutError if is_late else UpstreamError
            return kind(f"The engine for {self._wanted.label} {what}: {error!r}", source="engine")
        return grant.process.failure("died while it answered")


def _error_of(status: int, content: bytes) -> ErrorBody:
    """An engine's error in OpenAI's shape, whose `code` is a word and not the status again."""
    try:
        detail = json.loads(content)["error"]
        message, param = str(detail["message"]), detail.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, param = content[:500].decode(errors="replace") or f"HTTP {status} without a body", None
    is_clients = 400 <= status < 500
    return ErrorBody(
        error=ErrorDetail(
            message=message,
            type="invalid_request_error" if is_clients else "server_error",
            param=param if isinstance(param, str) else None,
            code=_CODES.get(status, "invalid_request" if is_clients else "upstream_error"),
        ),
        source="engine",
    )
