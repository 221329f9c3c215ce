"""Requests that other parts answer: streamed both ways, nothing kept in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import httpx
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sage_chat.backend import Reply
from sage_chat.upstream import relay_bytes, send
from sage_contracts.errors import NotFoundError
from sage_contracts.workers import INTERNAL_TOKEN_HEADER
from sage_gateway.relay import CLIENT_LEFT_STATUS, RelayResponse

_METHODS = ["GET", "POST", "DELETE"]
# RFC 9110, 7.6.1: these belong to one connection. The key is ours and ends here, as do framing and Host.
_HOP_HEADERS = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade"}
)
_NOT_FORWARDED = _HOP_HEADERS | {
    "host", "expect", "authorization", "cookie", INTERNAL_TOKEN_HEADER.lower()
}  # fmt: skip
_NOT_RETURNED = _HOP_HEADERS | {"server", "date", "x-request-id"}

ORCHESTRATED = (
    "/v1/files",
    "/v1/uploads",
    "/v1/fine_tuning",
    "/v1/sage/models",
    "/v1/sage/merges",
    "/v1/sage/sweeps",
    "/v1/sage/devices",
)
SERVED = ("/v1/sage/engines", "/v1/sage/release")


@dataclass(slots=True)
class Proxy:
    """To one part of the stack."""

    client: httpx.AsyncClient
    source: str
    base_url: str
    silence_s: float = 300.0

    async def forward(self, request: Request, path: str | None = None) -> Response:
        """The same request to that part, and its answer back.

        Raises: NotFoundError, ServiceUnavailableError, UpstreamError.
        """
        # For a slash too many the other side would name itself in a redirect, where no client may reach it.
        path = path or request.url.path.rstrip("/")
        # A decoded `..` would leave the public prefix on the other side.
        if ".." in path.split("/"):
            raise NotFoundError(f"There is no {path}.")
        url = httpx.URL(self.base_url.rstrip("/") + quote(path, safe="/:@"))
        url = url.copy_with(query=request.url.query.encode() or None)
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        outgoing = self.client.build_request(
            request.method,
            url,
            headers=[(key, value) for key, value in request.headers.items() if key not in _NOT_FORWARDED],
            content=request.stream() if has_body else None,
            timeout=httpx.Timeout(connect=5.0, read=self.silence_s, write=60.0, pool=10.0),
        )
        try:
            response = await send(self.client, outgoing, self.source)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT_STATUS)
        kept = {key: value for key, value in response.headers.items() if key not in _NOT_RETURNED}
        body = relay_bytes(response, self.source, self.silence_s, is_raw=True)
        return RelayResponse(Reply(response.status_code, body, kept, response.aclose))


def make_router(orchestrator: Proxy, inference: Proxy) -> APIRouter:
    router = APIRouter(tags=["proxied"])
    _add(router, orchestrator, ORCHESTRATED)
    _add(router, inference, SERVED)
    return router


def _add(router: APIRouter, proxy: Proxy, prefixes: Sequence[str]) -> None:
    for prefix in prefixes:
        for path in (prefix, prefix + "/{rest:path}"):
            router.add_api_route(path, _endpoint(proxy), methods=_METHODS, include_in_schema=False)


def _endpoint(proxy: Proxy) -> Callable[[Request], Awaitable[Response]]:
    async def forward(request: Request) -> Response:
        return await proxy.forward(request)

    return forward
