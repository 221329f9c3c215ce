"""Every error leaves a service with its own status, in OpenAI's shape, and comes back as itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field

from sage_contracts import errors
from sage_contracts.workers import INTERNAL_TOKEN_HEADER
from sage_servicekit.app import create_app, require_internal
from sage_servicekit.errors import STATUS, status_of
from sage_servicekit.settings import ServiceSettings

URL = "http://127.0.0.1"
TREE = errors.all_errors()
EXPECTED = {
    "internal_error": 500,
    "invalid_request": 400,
    "invalid_training_file": 400,
    "unknown_preset": 400,
    "not_found": 404,
    "model_not_found": 404,
    "conflict": 409,
    "not_yours": 409,
    "invalid_api_key": 401,
    "forbidden": 403,
    "rate_limit_exceeded": 429,
    "payload_too_large": 413,
    "service_unavailable": 503,
    "device_busy": 503,
    "engine_starting": 503,
    "engine_failed": 502,
    "upstream_error": 502,
    "upstream_timeout": 504,
    "insufficient_storage": 507,
    "training_failed": 500,
    "out_of_memory": 500,
}


class Part(BaseModel):
    name: str


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    count: int
    share: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    mode: Literal["fast", "exact"] = "fast"
    labels: dict[str, str] = Field(default_factory=dict)
    part: Part | None = None
    parts: list[Part] = []
    said: str | list[str] | list[int] = ""


def build(token: str | None) -> FastAPI:
    app = create_app("probe", ServiceSettings(home_dir=Path("/nowhere"), internal_token=token))
    router = APIRouter(prefix="/internal", dependencies=[Depends(require_internal)])

    @app.get("/raise/{code}")
    def fail(code: str) -> None:
        raise TREE[code]("it went wrong: do this", param="field", retry_after_s=1.2)

    @app.get("/bug")
    def bug() -> None:
        raise ZeroDivisionError("secret detail")

    @app.get("/stored")
    def stored() -> Part:
        return Part.model_validate({"secret": 1})

    @app.get("/breaks-off")
    def breaks_off() -> StreamingResponse:
        return StreamingResponse(str(1 // rest) for rest in (1, 0))

    @app.post("/echo")
    def echo(body: Body) -> Body:
        return body

    @router.get("/ping")
    def ping() -> str:
        return "pong"

    app.include_router(router)
    return app


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(build(None), URL, raise_server_exceptions=False) as made:
        yield made


def test_every_class_has_its_status() -> None:
    assert {code: status_of(cls("x")) for code, cls in TREE.items()} == EXPECTED
    assert set(STATUS) <= set(TREE.values())


def test_a_new_subclass_inherits_the_status_of_its_base() -> None:
    class Special(errors.NotFoundError):
        code = "special"

    try:
        assert status_of(Special("x")) == 404
    finally:
        del Special


@pytest.mark.parametrize("code", sorted(EXPECTED))
def test_an_error_crosses_http_as_itself(client: TestClient, code: str) -> None:
    response = client.get(f"/raise/{code}")

    assert response.status_code == EXPECTED[code]
    assert response.headers["retry-after"] == "2"
    assert response.headers["x-should-retry"] == str(TREE[code].retryable).lower()
    body = response.json()
    assert body["source"] == "probe"
    assert body["error"]["code"] == code
    assert body["error"]["param"] == "field"
    back = errors.from_response(
        response.status_code, response.content, retry_after=response.headers["retry-after"]
    )
    assert type(back) is TREE[code]
    assert (back.message, back.retry_after_s) == ("it went wrong: do this", 2.0)


def test_a_bug_is_reported_without_its_details(client: TestClient) -> None:
    response = client.get("/bug")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]
    assert 'method="GET",service="probe",status="500"' in client.get("/metrics").text


def test_what_we_stored_ourselves_is_not_the_requests_fault(client: TestClient) -> None:
    response = client.get("/stored")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_after_a_bug_the_connection_is_good_for_the_next_request() -> None:
    """A server drops the connection of an app that raises, after its answer."""
    with TestClient(build(None), URL, raise_server_exceptions=True) as strict:
        assert strict.get("/bug").status_code == 500


def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    with (
        TestClient(build(None), URL, raise_server_exceptions=True) as strict,
        pytest.raises(ZeroDivisionError),
    ):
        strict.get("/breaks-off")


@pytest.mark.parametrize(("body", "param"), [({}, "count"), ({"count": 1, "extra": 2}, "extra")])
def test_a_wrong_body_names_its_field(client: TestClient, body: dict[str, int], param: str) -> None:
    response = client.post("/echo", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {"count": 1, "share": 0},
            'share: Input should be greater than 0, or "auto" (given: 0)',
            "share",
        ),
        (
            {"count": 1, "share": "lots", "mode": "slow"},
            'share: Input should be a valid number, unable to parse string as a number, or "auto"'
            ' (given: "lots") (1 more)',
            "share",
        ),
        ({"count": 1, "mode": "slow"}, "mode: Input should be 'fast' or 'exact'", "mode"),
        (
            {"count": 1, "labels": {"constrained": 1}},
            "labels.constrained: Input should be a valid string",
            "labels.constrained",
        ),
        ({"count": 1, "labels": {"str": 1}}, "labels.str: Input should be a valid string", "labels.str"),
        ({"count": 1, "said": 7}, "said: Input should be a valid string", "said"),
        ({"count": 1, "said": ["a", []]}, "said: Input should be a valid string", "said"),
    ],
)
def test_of_a_word_or_a_number_the_number_is_explained(
    client: TestClient, body: dict[str, object], message: str, param: str
) -> None:
    error = client.post("/echo", json=body).json()["error"]
    assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["x"], "body: Input should be an object"),
        ({"count": 1, "labels": 3}, "labels: Input should be an object"),
        ({"count": 1, "part": 3}, "part: Input should be an object"),
        ({"count": 1, "parts": [{"name": "a"}, "b"]}, "parts.1: Input should be an object"),
    ],
)
def test_what_should_be_an_object_is_called_so(client: TestClient, body: object, message: str) -> None:
    assert client.post("/echo", json=body).json()["error"]["message"] == message


def test_a_body_that_is_no_json_is_called_so(client: TestClient) -> None:
    response = client.post("/echo", content=b"{", headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith("The body is not JSON: ") and error["param"] is None


def test_an_unknown_route_answers_in_the_same_shape(client: TestClient) -> None:
    response = client.get("/nothing")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["message"]) == (
        "not_found",
        "There is no GET /nothing here (see docs/api.md, Routes).",
    )
    other_way = client.delete("/echo")
    assert (other_way.status_code, other_way.headers["allow"]) == (405, "POST")
    assert other_way.json()["error"]["message"].startswith("There is no DELETE /echo here")


def test_health_metrics_and_request_ids(client: TestClient) -> None:
    response = client.get("/healthz", headers={"x-request-id": "mine"})
    assert response.json() == {"status": "ok", "service": "probe"}
    assert response.headers["x-request-id"] == "mine"
    assert (
        'sage_http_requests_total{method="GET",service="probe",status="200"}' in client.get("/metrics").text
    )


def test_health_says_which_embedded_stack_it_is_and_not_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAGE_HOME", str(tmp_path))
    monkeypatch.setenv("SAGE_STACK_ID", "5eed")
    said = TestClient(create_app("probe", ServiceSettings()), URL).get("/healthz")
    assert said.json() == {"status": "ok", "service": "probe", "stack": "5eed"}


@pytest.mark.parametrize(("token", "given", "status"), [
    (None, None, 200),
    ("s3cret", "s3cret", 200),
    ("s3cret", "wrong", 401),
    ("s3cret", None, 401),
])  # fmt: skip
def test_the_internal_token(token: str | None, given: str | None, status: int) -> None:
    with TestClient(build(token), URL) as client:
        headers = {} if given is None else {INTERNAL_TOKEN_HEADER: given}
        assert client.get("/internal/ping", headers=headers).status_code == status
        assert client.get("/healthz").status_code == 200
