"""One error tree: what one process raises, another raises again."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_contracts.errors import (
    AuthenticationError,
    DeviceBusyError,
    ErrorBody,
    InvalidDataError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    SageError,
    ServiceUnavailableError,
    UpstreamError,
    all_errors,
    from_body,
    from_response,
)
from sage_servicekit.errors import error_response, status_of

CLASSES = sorted(all_errors().values(), key=lambda cls: cls.code)


def test_every_class_has_a_code_of_its_own() -> None:
    pending, classes = [SageError], []
    while pending:
        cls = pending.pop()
        classes.append(cls)
        pending += [sub for sub in cls.__subclasses__() if sub.__module__ == cls.__module__]
    assert len({cls.code for cls in classes}) == len(classes) == len(CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_an_error_survives_http(cls: type[SageError]) -> None:
    response = error_response(
        cls("what, where, what to do", param="field", retry_after_s=2.4), "orchestrator"
    )
    again = from_response(
        response.status_code, bytes(response.body), retry_after=response.headers.get("retry-after")
    )
    assert type(again) is cls
    assert (again.message, again.param, again.source) == ("what, where, what to do", "field", "orchestrator")
    assert again.retry_after_s == 3
    assert 400 <= status_of(again) < 600


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)
def test_an_error_survives_another_process(cls: type[SageError]) -> None:
    error = cls("text", param="p", source="trainer", retry_after_s=1.5)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls and vars(again) == vars(error) and str(again) == "text"


@given(st.binary(max_size=400), st.integers(400, 599))
def test_any_body_at_all_becomes_an_error_with_a_message(content: bytes, status: int) -> None:
    error = from_response(status, content)
    assert isinstance(error, SageError) and error.message


def test_what_is_not_ours_is_quoted() -> None:
    error = from_response(502, b"<html>Bad gateway</html>")
    assert isinstance(error, UpstreamError) and "Bad gateway" in error.message


def test_a_code_from_a_newer_version_is_still_an_error() -> None:
    error = from_response(500, b'{"error": {"message": "m", "code": "not_invented_yet"}}')
    assert type(error) is SageError and error.message == "m"


@pytest.mark.parametrize(
    ("status", "code", "cls"),
    [
        (400, "context_length_exceeded", InvalidRequestError),
        (400, "unsupported_parameter", InvalidRequestError),
        (422, None, InvalidRequestError),
        (401, "account_deactivated", AuthenticationError),
        (403, "unsupported_country_region_territory", AuthenticationError),
        (404, "unknown_url", NotFoundError),
        (429, "insufficient_quota", RateLimitedError),
        (503, "overloaded", ServiceUnavailableError),
        (500, "server_error", SageError),
        (400, "device_busy", DeviceBusyError),
    ],
)
def test_a_code_of_another_server_is_told_by_its_status(
    status: int, code: str | None, cls: type[SageError]
) -> None:
    body = {"error": {"message": "m", "type": "invalid_request_error", "code": code}, "source": "openai"}
    error = from_response(status, json.dumps(body).encode())
    assert type(error) is cls
    assert (error.message, error.source) == ("m", "openai")


@pytest.mark.parametrize(
    ("detail", "cls"),
    [
        ({"type": "invalid_request_error", "code": "context_length_exceeded"}, InvalidRequestError),
        ({"type": "authentication_error"}, AuthenticationError),
        ({"type": "server_error"}, SageError),
        ({}, SageError),
    ],
)
def test_without_a_status_the_type_tells(detail: dict[str, str], cls: type[SageError]) -> None:
    body = ErrorBody.model_validate({"error": {"message": "m"} | detail})
    assert type(from_body(body)) is cls


def test_statuses_follow_the_tree() -> None:
    assert status_of(InvalidDataError("")) == 400
    assert status_of(DeviceBusyError("")) == 503
