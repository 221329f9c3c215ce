"""Talking to the server behind a backend: one retry, deadlines between bytes, errors in one shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx

from sage_contracts.errors import (
    ErrorBody,
    ErrorDetail,
    ServiceUnavailableError,
    UpstreamError,
    UpstreamTimeoutError,
)

_RETRY_PAUSE_S = 0.1
_MAX_QUOTED_CHARS = 300
_MAX_ERROR_BYTES = 64 * 1024

_CODES = {
    401: "invalid_api_key",
    403: "invalid_api_key",
    404: "model_not_found",
    413: "payload_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}
_KINDS = {401: "authentication_error", 403: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds. `first_byte_s` covers a cold engine; afterwards `between_bytes_s` holds, comments included."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    between_bytes_s: float = 300.0
    models_s: float = 3.0

    def for_request(self) -> httpx.Timeout:
        return httpx.Timeout(connect=self.connect_s, read=self.first_byte_s, write=60.0, pool=10.0)


def make_client() -> httpx.AsyncClient:
    """The pool that all backends and the proxy share. Nothing of the environment (proxies, netrc) is used."""
    # Idle connections go before servers close theirs (uvicorn: 5 s), or a request could meet a closing one.
    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=100, keepalive_expiry=4.0)
    return httpx.AsyncClient(limits=limits, timeout=Deadlines().for_request(), trust_env=False)


async def send(client: httpx.AsyncClient, request: httpx.Request, source: str) -> httpx.Response:
    """Send and return the open response; tries twice to connect, never twice to be answered.

    Raises: ServiceUnavailableError when nobody is there, UpstreamError when the connection broke
    or the answer did not come in time.
    """
    origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
    try:
        try:
            return await client.send(request, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            await asyncio.sleep(_RETRY_PAUSE_S)
            return await client.send(request, stream=True)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServiceUnavailableError(
            f"{source} at {origin} cannot be reached ({_reason(error)}). "
            "Check that it runs and that this address is right.",
            source=source,
            retry_after_s=2,
        ) from error
    except httpx.PoolTimeout as error:
        raise ServiceUnavailableError(
            "Too many requests are open at once; try again.", source=source, retry_after_s=1
        ) from error
    except httpx.TimeoutException as error:
        raise _too_late(request, f"{source} at {origin} did not answer in time.", source) from error
    except httpx.HTTPError as error:
        raise UpstreamError(
            f"{source} at {origin} broke off before it answered ({_reason(error)}).", source=source
        ) from error


async def relay_bytes(
    response: httpx.Response, source: str, between_bytes_s: float, *, is_raw: bool = False
) -> AsyncGenerator[bytes, None]:
    """The body as it comes, decompressed unless `is_raw`; then the response is closed.

    Raises: UpstreamError when it breaks off.
    """
    try:
        chunks = response.aiter_raw() if is_raw else response.aiter_bytes()
        while True:
            async with asyncio.timeout(between_bytes_s):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            yield chunk
    except TimeoutError as error:
        silence = f"{source} sent nothing for {between_bytes_s:g} s in the middle of its answer."
        raise _too_late(response.request, silence, source) from error
    except httpx.HTTPError as error:
        raise UpstreamError(
            f"{source} broke off in the middle of its answer ({_reason(error)}).", source=source
        ) from error
    finally:
        await response.aclose()


async def read_whole(response: httpx.Response, source: str, between_bytes_s: float) -> bytes:
    """The rest of the body. Raises: UpstreamError."""
    return b"".join([chunk async for chunk in relay_bytes(response, source, between_bytes_s)])


async def read_error(response: httpx.Response, source: str) -> ErrorBody:
    """The error behind a response that is none of 2xx, in OpenAI's shape. Closes the response."""
    content = b""
    try:
        async with asyncio.timeout(10):
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) >= _MAX_ERROR_BYTES:
                    break
    except (httpx.HTTPError, TimeoutError):
        pass  # the status says enough; the text would only have been a courtesy
    finally:
        await response.aclose()
    return error_body(response.status_code, content, source)


def error_body(status: int, content: bytes, source: str) -> ErrorBody:
    """What a server meant: OpenAI's, vLLM's older, Ollama's and FastAPI's shapes, or a quote of the text."""
    try:
        parsed: Any = json.loads(content)
    except ValueError:
        parsed = None
    given: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    inner = given.get("error", given.get("detail"))
    detail: dict[str, Any] = inner if isinstance(inner, dict) else given
    message = detail.get("message") if isinstance(detail.get("message"), str) else None
    if isinstance(inner, str):
        message = inner
    quoted = content[:_MAX_QUOTED_CHARS].decode(errors="replace").strip()
    code, kind, param = detail.get("code"), detail.get("type"), detail.get("param")
    stated_source = given.get("source")
    return ErrorBody(
        error=ErrorDetail(
            message=message or f"HTTP {status} from {source}: {quoted or 'no text'}",
            type=kind if isinstance(kind, str) else _kind(status),
            param=param if isinstance(param, str) else None,
            # Numeric codes repeat the status; a word is what clients can branch on.
            code=code if isinstance(code, str) and not code.isdecimal() else _code(status),
        ),
        source=stated_source if isinstance(stated_source, str) else source,
    )


def _too_late(request: httpx.Request, message: str, source: str) -> UpstreamError:
    # What was posted may be under way still, and asked for again it would be done, and paid for, again.
    cls = UpstreamTimeoutError if request.method == "POST" else UpstreamError
    return cls(message, source=source)


def _code(status: int) -> str:
    return _CODES.get(status, "invalid_request" if 400 <= status < 500 else "upstream_error")


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if 400 <= status < 500 else "server_error")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
