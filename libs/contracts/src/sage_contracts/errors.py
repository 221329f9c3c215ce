"""One tree of errors. A class carries a stable code; what HTTP makes of it is decided in servicekit."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error response: OpenAI's shape, plus the part that raised it."""

    model_config = ConfigDict(extra="allow")

    error: ErrorDetail
    source: str | None = None


class SageError(Exception):
    """Base of all errors a user may see: says what happened, where, and what to do."""

    code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        source: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.source = source
        self.retry_after_s = retry_after_s

    def to_body(self, source: str) -> ErrorBody:
        """The wire form; `source` is used where the error does not name its own."""
        detail = ErrorDetail(message=self.message, type=self.kind, param=self.param, code=self.code)
        return ErrorBody(error=detail, source=self.source or source)

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only state would be lost by the default pickling of exceptions.
        return (_rebuild, (type(self), self.message, self.param, self.source, self.retry_after_s))


def _rebuild(
    cls: type[SageError], message: str, param: str | None, source: str | None, retry_after_s: float | None
) -> SageError:
    return cls(message, param=param, source=source, retry_after_s=retry_after_s)


class InvalidRequestError(SageError):
    """The request itself is wrong: a field, a file, a name."""

    code = "invalid_request"
    kind = "invalid_request_error"


class InvalidDataError(InvalidRequestError):
    """Training data that cannot be used; the message names rows and fields."""

    code = "invalid_training_file"


class UnknownPresetError(InvalidRequestError):
    code = "unknown_preset"


class NotFoundError(SageError):
    code = "not_found"
    kind = "invalid_request_error"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class ConflictError(SageError):
    """The thing exists but is in a state that does not allow this."""

    code = "conflict"
    kind = "invalid_request_error"


class NotYoursError(ConflictError):
    """A claim, lease or attempt token that is not (or no longer) the caller's."""

    code = "not_yours"


class AuthenticationError(SageError):
    code = "invalid_api_key"
    kind = "authentication_error"


class ForbiddenError(SageError):
    """Whatever the key, this may not be sent from there; the message says from where it may."""

    code = "forbidden"
    kind = "invalid_request_error"


class RateLimitedError(SageError):
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"
    retryable = True


class PayloadTooLargeError(SageError):
    code = "payload_too_large"
    kind = "invalid_request_error"


class ServiceUnavailableError(SageError):
    """A part that should answer does not; trying again may help."""

    code = "service_unavailable"
    retryable = True


class DeviceBusyError(ServiceUnavailableError):
    """The device is leased to somebody else; the message says to whom and for how long."""

    code = "device_busy"


class EngineStartingError(ServiceUnavailableError):
    """The engine is being started and was not ready before the caller's deadline."""

    code = "engine_starting"


class EngineFailedError(SageError):
    """The engine died or would not start; the message carries the root cause from its log."""

    code = "engine_failed"


class UpstreamError(SageError):
    """A server we relay to answered with an error of its own, or not at all."""

    code = "upstream_error"
    retryable = True


class UpstreamTimeoutError(UpstreamError):
    """It did not answer in time what is done all over again when it is asked once more."""

    code = "upstream_timeout"
    retryable = False


class StorageFullError(SageError):
    code = "insufficient_storage"


class TrainingFailedError(SageError):
    code = "training_failed"


class OutOfMemoryError(TrainingFailedError):
    code = "out_of_memory"


# How the errors of servers that are not ours are read; servicekit decides which status ours have.
_BY_STATUS: dict[int, type[SageError]] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    429: RateLimitedError,
    503: ServiceUnavailableError,
}
_BY_KIND: dict[str, type[SageError]] = {
    cls.kind: cls for cls in (InvalidRequestError, AuthenticationError, RateLimitedError)
}


def all_errors() -> dict[str, type[SageError]]:
    """Every class of this module by its code, so that a client can raise what the server raised.

    Classes that a part derives for its own use travel as the class they derive from.
    """
    found: dict[str, type[SageError]] = {}
    pending: list[type[SageError]] = [SageError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        pending.extend(sub for sub in cls.__subclasses__() if sub.__module__ == __name__)
    return found


def from_body(body: ErrorBody, *, status: int | None = None, retry_after_s: float | None = None) -> SageError:
    """The error a response carried, as the class that raised it.

    A code that is none of ours, as other servers have them, is told by the status, else by the error's type.
    """
    detail = body.error
    kind = detail.type if "type" in detail.model_fields_set else ""
    cls = all_errors().get(detail.code or "") or _nearest(status, kind)
    return cls(detail.message, param=detail.param, source=body.source, retry_after_s=retry_after_s)


def _nearest(status: int | None, kind: str) -> type[SageError]:
    if status is None:
        return _BY_KIND.get(kind, SageError)
    return _BY_STATUS.get(status, InvalidRequestError if 400 <= status < 500 else SageError)


def from_response(status: int, content: bytes, *, retry_after: str | None = None) -> SageError:
    """The error behind an HTTP response of ours, or an UpstreamError that quotes what came instead."""
    retry_after_s = float(retry_after) if retry_after and retry_after.isdecimal() else None
    try:
        body = ErrorBody.model_validate_json(content)
    except ValidationError:
        text = content[:300].decode(errors="replace").strip() or "an empty body"
        return UpstreamError(f"HTTP {status} with a body that is no error of ours: {text}")
    return from_body(body, status=status, retry_after_s=retry_after_s)
