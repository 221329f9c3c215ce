"""The gateway's app in this process, with nothing behind it: what it answers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

NOWHERE = "http://127.0.0.1:1"
QUESTION = {"model": "mock", "messages": [{"role": "user", "content": "Which quantisation?"}]}


def settings(home: Path, **more: Any) -> GatewaySettings:
    docs = home / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "memory.md").write_text(
        "# Memory\n\n## Quantisation\n\n" + "8-bit quantisation saves memory. " * 10
    )
    parts: dict[str, Any] = {
        "orchestrator_url": NOWHERE,
        "inference_url": NOWHERE,
        "ollama_base_url": NOWHERE,
    }
    return GatewaySettings(home_dir=home, docs_dir=docs, **parts, **more)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAGE_API_KEYS", "OPENAI_API_KEY", "SAGE_OPENAI_BASE_URL", "SAGE_VLLM_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


async def client_of(given: GatewaySettings) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(given)
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
    async with app.router.lifespan_context(app), client:
        yield client


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_of(settings(tmp_path)):
        yield client


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_of(settings(tmp_path, api_keys="first, second,")):
        yield client


async def test_mock_answers_with_citations_in_text_and_header(gateway: httpx.AsyncClient) -> None:
    response = await gateway.post("/v1/chat/completions", json=QUESTION | {"index": "docs-public"})
    assert response.status_code == 200
    assert "[1] memory.md#quantisation" in response.json()["choices"][0]["message"]["content"]
    (citation,) = json.loads(response.headers["x-sage-citations"])
    assert (citation["id"], citation["source"]) == (1, "memory.md#quantisation")
    assert float(response.headers["x-sage-overhead-ms"]) >= 0
    assert response.headers["x-sage-backend"] == "mock"


async def test_without_an_index_there_is_no_citation_header(gateway: httpx.AsyncClient) -> None:
    response = await gateway.post("/v1/chat/completions", json=QUESTION)
    assert "x-sage-citations" not in response.headers


async def test_a_question_that_the_index_cannot_answer(gateway: httpx.AsyncClient) -> None:
    asked = QUESTION | {"messages": [{"role": "user", "content": "weather on Mars"}], "index": "docs-public"}
    response = await gateway.post("/v1/chat/completions", json=asked)
    assert "Nothing was found" in response.json()["choices"][0]["message"]["content"]
    assert response.headers["x-sage-citations"] == "[]"


@pytest.mark.parametrize(
    ("last", "is_found"),
    [
        ("And why is that?", True),
        ("Tell me more about that", True),
        ("为什么呢？", True),
        ("Weather on Mars?", False),
        ("火星呢？", False),
    ],
)
async def test_a_question_about_what_was_said_is_answered_from_its_passages(
    gateway: httpx.AsyncClient, last: str, is_found: bool
) -> None:
    answer = {"role": "assistant", "content": "8 bits [1]."}
    asked = [*QUESTION["messages"], answer, {"role": "user", "content": "And?"}, answer]
    messages = [*asked, {"role": "user", "content": last}]
    response = await gateway.post(
        "/v1/chat/completions", json=QUESTION | {"messages": messages, "index": "docs-public"}
    )
    sources = [citation["source"] for citation in json.loads(response.headers["x-sage-citations"])]
    assert sources == (["memory.md#quantisation"] if is_found else [])


async def test_a_response_is_counted_as_the_chat_that_it_is(gateway: httpx.AsyncClient) -> None:
    response = await gateway.post("/v1/responses", json={"input": "Which quantisation?"})
    assert (response.json()["model"], response.headers["x-sage-backend"]) == ("mock", "mock")
    assert float(response.headers["x-sage-overhead-ms"]) >= 0
    metrics = (await gateway.get("/metrics")).text
    assert 'sage_chat_answers_total{backend="mock",status="200"} 1.0' in metrics
    assert "sage_chat_overhead_seconds_count 1.0" in metrics


@pytest.mark.parametrize("model", ["", "default", None])
async def test_no_model_means_the_default(gateway: httpx.AsyncClient, model: str | None) -> None:
    body = {key: value for key, value in QUESTION.items() if key != "model"}
    response = await gateway.post(
        "/v1/chat/completions", json=body if model is None else body | {"model": model}
    )
    assert response.json()["model"] == "mock"


@pytest.mark.parametrize(
    ("path", "asked", "parameters"),
    [
        ("chat/completions", QUESTION, chat_params.CompletionCreateParamsNonStreaming),
        ("responses", {"model": "mock", "input": "Hi"}, response_params.ResponseCreateParamsNonStreaming),
    ],
    ids=["chat", "responses"],
)
async def test_what_openais_types_allow_to_be_null_may_be_null(
    gateway: httpx.AsyncClient, path: str, asked: dict[str, Any], parameters: type
) -> None:
    fields = [name for name, kind in get_type_hints(parameters).items() if NoneType in get_args(kind)]
    assert {"stream", "temperature"} <= set(fields)
    response = await gateway.post(f"/v1/{path}", json=dict.fromkeys(fields) | asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b'{"model": "mock", "messages": [], "x": NaN}', 400, "invalid_request", None),
        (b'{"model": "mock", "messages": [], "temperature": 1e999}', 400, "invalid_request", None),
        (b'{"model": "mock", "messages": [], "temperature": -1e999}', 400, "invalid_request", None),
        (
            b'{"model": "mock", "messages": [{"role": "user", "content": "\xed\xa0\xbd"}]}',
            400,
            "invalid_request",
            None,
        ),
        (b'{"model": "mock", "messages": []}', 400, "invalid_request", "messages"),
        (b'{"model": "mock"}', 400, "invalid_request", "messages"),
        (b'{"model": "mock", "messages": [{"role": "king"}]}', 400, "invalid_request", "messages.0.role"),
        (
            b'{"model": "mock", "messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}',
            400,
            "invalid_request",
            "messages.0.tool_calls.0.function",
        ),
        (b'{"model": "vllm/a", "messages": [{"role": "user"}]}', 400, "invalid_request", "model"),
        (b'{"model": "mock", "messages": [{"role": "user"}], "index": "x"}', 404, "not_found", "index"),
        (b'{"model": "finetune/code", "messages": [{"role": "user"}]}', 503, "service_unavailable", None),
        (b'{"model": "code", "messages": [{"role": "user"}]}', 503, "service_unavailable", None),
    ],
)
async def test_bad_requests_are_told_in_openais_shape(
    gateway: httpx.AsyncClient, body: bytes, status: int, code: str, param: str | None
) -> None:
    response = await gateway.post("/v1/chat/completions", content=body)
    answer = response.json()
    assert (response.status_code, answer["error"]["code"], answer["error"]["param"]) == (status, code, param)
    assert answer["error"]["message"] and answer["source"]


@pytest.mark.parametrize(("path", "field"), [("completions", "prompt"), ("embeddings", "input")])
async def test_the_field_that_a_bare_request_lacks_is_named(
    gateway: httpx.AsyncClient, path: str, field: str
) -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({field: "def f"}, "model"),
        ({"model": 3, field: "def f"}, "model"),
        ({"model": "code"}, field),
        ({"model": "code", field: None}, field),
        ({"model": "code", field: "def f", "index": "docs-public"}, "index"),
    ]
    for body, param in asked:
        response = await gateway.post(f"/v1/{path}", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert error["message"].startswith(f"{param}: ")


async def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async for client in client_of(settings(tmp_path, max_body_bytes=1000)):
        response = await client.post("/v1/chat/completions", content=b" " * 1001)
        assert response.status_code == 413
        for path in ("/v1/responses", "/v1/sage/sweeps", "/v1/uploads", "/v1/sage/release"):
            response = await client.post(path, files={"file": b" " * 1001})
            assert response.status_code == 413, path


async def test_files_are_passed_on_however_large(tmp_path: Path) -> None:
    async for client in client_of(settings(tmp_path, max_body_bytes=1000)):
        for path in ("/v1/files", "/v1/uploads/upload_1/parts"):
            response = await client.post(path, files={"file": b" " * 1001})
            assert (response.status_code, response.json()["source"]) == (503, "orchestrator")


async def test_parts_that_do_not_answer_are_down_and_say_why(gateway: httpx.AsyncClient) -> None:
    parts = {part["name"]: part for part in (await gateway.get("/v1/sage/status")).json()["parts"]}
    assert set(parts) == {"gateway", "orchestrator", "inference", "trainer", "merger"}
    assert parts["gateway"]["state"] == "up" and parts["trainer"]["state"] == "down"
    assert "does not answer" in parts["orchestrator"]["detail"]["error"]


async def test_proxied_routes_name_the_part_that_is_missing(gateway: httpx.AsyncClient) -> None:
    for path, source in [("/v1/files", "orchestrator"), ("/v1/sage/engines", "inference")]:
        response = await gateway.get(path)
        assert (response.status_code, response.json()["source"]) == (503, source)
        assert response.headers["retry-after"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/internal/workers",
        "/v1/files/%2e%2e/%2e%2e/internal/workers",
        "/v1/models/%2e%2e/%2e%2e/internal/workers",
        "/v1/models/finetune/%2E%2E/..%2f..%2finternal/workers",
        "/v1/models/base:x/%2e%2e/%2e%2e/%2e%2e/internal/workers",
        "/v1/nothing",
    ],
)
async def test_nothing_else_is_proxied(gateway: httpx.AsyncClient, method: str, path: str) -> None:
    assert (await gateway.request(method, path)).status_code == 404


async def test_models_and_indexes_of_a_gateway_that_is_alone(gateway: httpx.AsyncClient) -> None:
    listed = (await gateway.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["mock"] and listed["object"] == "list"
    assert (await gateway.get("/v1/models/mock")).json()["id"] == "mock"
    assert (await gateway.get("/v1/models/vllm/nobody")).status_code == 404
    assert (await gateway.get("/v1/sage/indexes")).json()["data"] == []


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic first", "first", "Bearer firs"])
async def test_a_locked_gateway_wants_a_key(locked: httpx.AsyncClient, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/models", "/v1/files", "/v1/sage/status", "/v1/sage/indexes"):
        response = await locked.get(path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    assert (await locked.post("/v1/chat/completions", json=QUESTION, headers=headers)).status_code == 401


async def test_pages_of_other_sites_are_refused_by_an_open_gateway(gateway: httpx.AsyncClient) -> None:
    rebound = await gateway.post("/v1/chat/completions", json=QUESTION, headers={"host": "evil.example:8080"})
    posted = await gateway.post(
        "/v1/chat/completions",
        content=json.dumps(QUESTION),
        headers={
            "content-type": "text/plain",
            "sec-fetch-site": "cross-site",
            "origin": "https://evil.example",
        },
    )
    assert (rebound.status_code, posted.status_code) == (403, 403)


async def test_a_locked_gateway_answers_to_the_name_that_a_proxy_sends(locked: httpx.AsyncClient) -> None:
    headers = {"host": "sage.example", "authorization": "Bearer first"}
    assert (await locked.get("/v1/models", headers=headers)).status_code == 200
    del headers["authorization"]
    assert (await locked.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("key", ["first", "second"])
async def test_every_key_opens(locked: httpx.AsyncClient, key: str) -> None:
    response = await locked.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize("key", ["schl\u00fcssel", "\u5bc6\u94a5", "voil\u00e0"])
async def test_a_key_of_any_letters_opens_as_a_terminal_sends_it(tmp_path: Path, key: str) -> None:
    async for client in client_of(settings(tmp_path, api_keys=key)):
        response = await client.get("/v1/models", headers={b"authorization": f"Bearer {key}".encode()})
        assert response.status_code == 200
        wrong = {b"authorization": f"Bearer {key}x".encode()}
        assert (await client.get("/v1/models", headers=wrong)).status_code == 401


async def test_health_alone_needs_no_key(locked: httpx.AsyncClient) -> None:
    assert (await locked.get("/healthz")).json()["status"] == "ok"
    for path in ("/metrics", "/docs", "/redoc", "/openapi.json", "/nothing"):
        refused = await locked.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/sage/indexes/mine", "/healthz"])
async def test_without_a_key_no_byte_of_a_body_is_read(locked: httpx.AsyncClient, path: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    answer = await locked.post(path, content=body())
    assert answer.status_code == (405 if path == "/healthz" else 401)


async def test_the_gateway_counts_what_it_answered(locked: httpx.AsyncClient) -> None:
    locked.headers["authorization"] = "Bearer first"
    await locked.post("/v1/chat/completions", json=QUESTION)
    metrics = (await locked.get("/metrics")).text
    assert 'sage_chat_answers_total{backend="mock",status="200"} 1.0' in metrics
    assert "sage_chat_overhead_seconds_count 1.0" in metrics


def test_the_seeds_port_moves_the_inference_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGE_INFERENCE_URL", raising=False)
    monkeypatch.setenv("SAGE_CHAT_FINETUNE_PORT", "8123")
    assert GatewaySettings().addresses.inference_url == "http://127.0.0.1:8123"
    monkeypatch.setenv("SAGE_INFERENCE_URL", "http://inference:8000/")
    assert GatewaySettings().addresses.inference_url == "http://inference:8000"


def test_empty_variables_are_unset_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAGE_API_KEYS", "OPENAI_API_KEY", "SAGE_OPENAI_BASE_URL", "SAGE_VLLM_BASE_URL"):
        monkeypatch.setenv(name, "")
    given = GatewaySettings()
    assert given.api_keys == () and given.addresses.openai is None and given.addresses.vllm is None


def test_the_gateway_starts_without_heavy_modules() -> None:
    heavy = ["torch", "transformers", "numpy", "bm25s", "celery", "sqlalchemy", "openai"]
    code = f"import sys, sage_gateway.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
