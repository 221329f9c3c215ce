"""The one table from error codes to HTTP, and the handlers that apply it."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sage_contracts import errors
from sage_servicekit.validation import describe_validation

logger = logging.getLogger(__name__)

STATUS: dict[type[errors.SageError], int] = {
    errors.SageError: 500,
    errors.InvalidRequestError: 400,
    errors.NotFoundError: 404,
    errors.ConflictError: 409,
    errors.AuthenticationError: 401,
    errors.ForbiddenError: 403,
    errors.RateLimitedError: 429,
    errors.PayloadTooLargeError: 413,
    errors.ServiceUnavailableError: 503,
    errors.EngineFailedError: 502,
    errors.UpstreamError: 502,
    errors.UpstreamTimeoutError: 504,
    errors.StorageFullError: 507,
    errors.TrainingFailedError: 500,
}


def status_of(error: errors.SageError) -> int:
    """The HTTP status of the nearest class in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def headers_of(error: errors.SageError) -> dict[str, str]:
    """Whether to come again, and in how many whole seconds where the error knows it."""
    # By the status alone OpenAI's clients would send a refused transition (409) or a dead engine (502) again.
    headers = {"x-should-retry": str(error.retryable).lower()}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers


def error_response(error: errors.SageError, source: str) -> JSONResponse:
    """An error as OpenAI's body."""
    return JSONResponse(error.to_body(source).model_dump(), status_of(error), headers_of(error))


def no_route(request: Request) -> errors.NotFoundError:
    """What is not offered, rather than not there."""
    return errors.NotFoundError(
        f"There is no {request.method} {request.url.path[:200]} here (see docs/api.md, Routes)."
    )


def install(app: FastAPI, source: str) -> None:
    """Register the handlers: every error leaves in one shape."""

    @app.exception_handler(errors.SageError)
    async def _sage(_: Request, error: errors.SageError) -> JSONResponse:
        return error_response(error, source)

    @app.exception_handler(RequestValidationError)
    async def _request(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(describe_validation(error.errors()), source)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        known = {404: errors.NotFoundError, 401: errors.AuthenticationError}
        cls = known.get(error.status_code, errors.InvalidRequestError)
        # Our endpoints raise errors of ours: these two are the router's, which found nothing.
        is_routing = error.status_code in (404, 405)
        told = no_route(request).message if is_routing else str(error.detail)
        return JSONResponse(cls(told).to_body(source).model_dump(), error.status_code, error.headers)

    app.add_middleware(_Unexpected, source=source)


class _Unexpected:
    """Answers for what nobody caught.

    A handler of starlette would raise it once more, and the server would drop the connection: whoever sends
    the next request over it is told that this service broke off.
    """

    def __init__(self, app: ASGIApp, source: str) -> None:
        self._app = app
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http" or has_begun:
                raise  # an answer that is not whole must not look as if it were
            logger.error("unexpected error in %s %s", scope["method"], scope["path"][:200], exc_info=error)
            name = type(error).__name__
            wrapped = errors.SageError(f"{name} inside {self._source}; its log has the traceback.")
            await error_response(wrapped, self._source)(scope, receive, send)
