"""The FastAPI app that every HTTP service starts from."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sage_contracts.errors import AuthenticationError, SageError
from sage_contracts.workers import INTERNAL_TOKEN_HEADER
from sage_servicekit import errors
from sage_servicekit.bodies import CheckedBodies
from sage_servicekit.errors import error_response
from sage_servicekit.origins import CheckedOrigins
from sage_servicekit.settings import ServiceSettings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_HEALTH = "/healthz"


def create_app(
    name: str,
    settings: ServiceSettings,
    lifespan: Lifespan | None = None,
    *,
    uploads: Iterable[str] = (),
    admit: Callable[[Headers], None] | None = None,
) -> FastAPI:
    """An app with health, metrics, request ids, the internal token, the error handlers and checked requests.

    `uploads`: the paths of its routes that stream their bodies, however large. Every other body is bounded.
    `admit` raises a SageError where a request's headers do not let it in; None lets everybody in.
    """
    app = FastAPI(title=f"SAGE Finetune {name}", version="0.1.0", lifespan=lifespan)
    app.state.settings = settings
    registry = CollectorRegistry()
    app.state.metrics_registry = registry
    app.add_middleware(
        CheckedBodies,
        source=name,
        max_bytes=settings.max_body_bytes,
        uploads=[_HEALTH, *uploads],  # everybody may ask for it, so nothing that comes along is kept
        silence_s=settings.client_silence_s,
    )
    if admit is not None:
        app.add_middleware(_Admission, source=name, admit=admit)
    app.add_middleware(CheckedOrigins, source=name, is_local=settings.is_local, asks_key=admit is not None)
    errors.install(app, name)
    _measure(app, name, registry)  # outermost: it counts what went wrong as well

    @app.get(_HEALTH, include_in_schema=False)
    async def healthz() -> dict[str, str]:
        # A command of another home on this machine has to know that this is not its stack.
        stack = {"stack": settings.stack_id} if settings.stack_id else {}
        return {"status": "ok", "service": name} | stack

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def require_internal(request: Request) -> None:
    """Dependency of /internal routers: the shared token, where one is set. Raises: AuthenticationError."""
    settings: ServiceSettings = request.app.state.settings
    if settings.internal_token is None:
        return
    given = request.headers.get(INTERNAL_TOKEN_HEADER, "")
    if not hmac.compare_digest(given.encode(), settings.internal_token.get_secret_value().encode()):
        raise AuthenticationError(
            f"{INTERNAL_TOKEN_HEADER} is missing or wrong: set SAGE_INTERNAL_TOKEN alike"
        )


class _Admission:
    """Asks `admit` before anything of a body is read, for whatever is asked but the service's health."""

    def __init__(self, app: ASGIApp, source: str, admit: Callable[[Headers], None]) -> None:
        self._app = app
        self._source = source
        self._admit = admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _HEALTH:
            try:
                self._admit(Headers(scope=scope))
            except SageError as error:
                await error_response(error, self._source)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _RequestLog:
    """Pure ASGI, so that streamed bodies pass through untouched and unbuffered."""

    def __init__(self, app: Any, name: str, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            "sage_http_requests", "Requests", ["service", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            "sage_http_first_byte_seconds", "Seconds to the response's start", ["service"], registry=registry
        )
        self._name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        incoming = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = incoming[:128] or secrets.token_hex(8).encode()

        async def send_marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._seconds.labels(self._name).observe(time.perf_counter() - started)
                self._requests.labels(self._name, scope["method"], str(message["status"])).inc()
                message.setdefault("headers", []).append((b"x-request-id", request_id))
            await send(message)

        await self._app(scope, receive, send_marked)


def _measure(app: FastAPI, name: str, registry: CollectorRegistry) -> None:
    app.add_middleware(_RequestLog, name=name, registry=registry)
