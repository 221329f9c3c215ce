"""Backends of OpenAI's dialect: the request is renamed and sent on, the answer's bytes are relayed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from sage_chat.backend import BackendName, ChatCall, Reply, whole_reply
from sage_chat.completions import error_event, to_json
from sage_chat.events import EventSplitter, ends_answer
from sage_chat.upstream import Deadlines, error_body, read_error, read_whole, relay_bytes, send
from sage_contracts.errors import InvalidRequestError, SageError, UpstreamError
from sage_contracts.models import ModelCard

_KEPT_HEADERS = ("content-type", "retry-after", "x-should-retry", "openai-processing-ms")
_KEPT_PREFIXES = ("x-ratelimit-", "x-sage-")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server's `/v1` is, and the key it wants."""

    base_url: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Relay:
    """The one way to an OpenAI-dialect server: bytes in, bytes out."""

    client: httpx.AsyncClient
    source: str
    endpoint: Endpoint
    deadlines: Deadlines = field(default_factory=Deadlines)

    async def post(
        self, path: str, body: dict[str, Any], extra_headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Relay one request. Answers other than 2xx come back as a Reply in OpenAI's error shape.

        Raises: ServiceUnavailableError, UpstreamError.
        """
        request = self.client.build_request(
            "POST",
            self.endpoint.base_url + path,
            content=to_json(body),
            # Uncompressed, or proxies in between would hold back events to fill their windows.
            headers={
                "content-type": "application/json",
                "accept-encoding": "identity",
                **self.endpoint.headers,
                **(extra_headers or {}),
            },
            timeout=self.deadlines.for_request(),
        )
        response = await send(self.client, request, self.source)
        headers = kept_headers(response.headers)
        if not response.is_success:
            return await self._error(response, headers)
        reply = Reply(response.status_code, self._events(response), headers, response.aclose)
        if not reply.is_stream:
            # Small: read whole, so that a server that dies half-way is an error and not half a JSON.
            content = await read_whole(response, self.source, self.deadlines.first_byte_s)
            if "json" not in headers.get("content-type", ""):
                self._require_json(response.status_code, content)
            reply = whole_reply(response.status_code, content, headers)
        return reply

    async def get_models(self) -> list[dict[str, Any]]:
        """GET /models as plain objects. Raises: SageError."""
        request = self.client.build_request(
            "GET",
            f"{self.endpoint.base_url}/models",
            headers=self.endpoint.headers,
            timeout=self.deadlines.models_s,
        )
        response = await send(self.client, request, self.source)
        if not response.is_success:
            body = await read_error(response, self.source)
            raise UpstreamError(body.error.message, source=self.source)
        try:
            await response.aread()
            return [item for item in response.json()["data"] if isinstance(item, dict) and "id" in item]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(
                f"{self.source} answered /models with no list of models.", source=self.source
            ) from error
        finally:
            await response.aclose()

    async def _events(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        splitter, has_ended = EventSplitter(), False
        try:
            async with aclosing(relay_bytes(response, self.source, self.deadlines.between_bytes_s)) as chunks:
                async for chunk in chunks:
                    if events := splitter.feed(chunk):
                        has_ended = has_ended or any(map(ends_answer, events))
                        yield b"".join(events)
            for event in splitter.close():
                has_ended = has_ended or ends_answer(event)
                yield event
            if not has_ended:
                raise UpstreamError(f"{self.source} ended its answer before it was done.", source=self.source)
        except SageError as error:
            # The status is long gone: say it in the stream, or the answer would look complete.
            yield error_event(error.to_body(self.source))

    def _require_json(self, status: int, content: bytes) -> None:
        try:
            json.loads(content)
        except ValueError as error:
            told = error_body(status, content, self.source).error.message
            raise UpstreamError(
                f"{self.source} answered with no JSON: check that its address is right. {told}",
                source=self.source,
            ) from error

    async def _error(self, response: httpx.Response, headers: dict[str, str]) -> Reply:
        body = await read_error(response, self.source)
        status = response.status_code if response.is_error else 502
        kept = {key: value for key, value in headers.items() if not key.startswith("content-")}
        return whole_reply(status, to_json(body.model_dump()), kept)


@dataclass(slots=True)
class DialectBackend:
    """The openai and vllm backends: a server of that dialect, if one is configured."""

    name: BackendName
    relay: Relay | None
    unconfigured: str
    """What to say, and do, when it is not."""

    async def stream(self, call: ChatCall) -> Reply:
        return await self._relay().post("/chat/completions", call.for_upstream())

    async def complete(self, call: ChatCall) -> Reply:
        return await self._relay().post("/completions", call.for_upstream())

    async def embed(self, call: ChatCall) -> Reply:
        return await self._relay().post("/embeddings", call.for_upstream())

    async def models(self) -> list[ModelCard]:
        if self.relay is None:
            return []
        return [
            ModelCard(
                id=str(item["id"]),
                created=_epoch_s(item.get("created")),
                owned_by=str(item.get("owned_by") or self.name),
            )
            for item in await self.relay.get_models()
        ]

    def _relay(self) -> Relay:
        if self.relay is None:
            raise InvalidRequestError(self.unconfigured, param="model", source=self.name)
        return self.relay


def _epoch_s(created: Any) -> int:
    try:
        return int(created)
    except (TypeError, ValueError, OverflowError):
        return 0  # a server that says it in a way of its own still has its models


def kept_headers(headers: httpx.Headers) -> dict[str, str]:
    """The headers of an answer that mean something to our client."""
    return {
        key: value for key, value in headers.items() if key in _KEPT_HEADERS or key.startswith(_KEPT_PREFIXES)
    }
