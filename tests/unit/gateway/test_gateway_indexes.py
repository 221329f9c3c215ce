"""/v1/sage/indexes of a gateway that is alone: what is added is found by the next question."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sage_gateway.main import build_app
from sage_gateway.settings import GatewaySettings

MANUAL = {
    "path": "guide/manual.md",
    "text": "# 手册\n\n## 退货\n\n客户可以在三十天内申请退货。" + "说明文字。" * 50,
}
MINE = "/v1/sage/indexes/mine"


async def client_of(home: Path, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    docs = home / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "memory.md").write_text("# Memory\n\n" + "8-bit quantisation saves memory. " * 10)
    app = build_app(GatewaySettings(home_dir=home, docs_dir=docs, **more))
    transport = httpx.ASGITransport(app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
    async with app.router.lifespan_context(app), client:
        yield client


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for client in client_of(tmp_path, api_keys=""):
        yield client


async def ask(gateway: httpx.AsyncClient, question: str, index: str) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    return await gateway.post(
        "/v1/chat/completions", json={"model": "mock", "messages": messages, "index": index}
    )


async def test_added_documents_answer_are_listed_and_go(gateway: httpx.AsyncClient) -> None:
    put = await gateway.put(MINE, json={"documents": [MANUAL]})
    assert (put.status_code, put.json()["id"], put.json()["files"], put.json()["passages"]) == (
        200,
        "mine",
        1,
        1,
    )
    answer = await ask(gateway, "多少天内可以退货？", "mine")
    assert "三十天" in answer.json()["choices"][0]["message"]["content"]
    (citation,) = json.loads(answer.headers["x-sage-citations"])
    assert citation["source"] == "guide/manual.md#退货"
    assert (await gateway.get("/v1/sage/indexes")).json()["data"] == [put.json()]

    gone = await gateway.delete(MINE)
    assert (gone.status_code, gone.json()) == (200, {"id": "mine", "object": "sage.index", "deleted": True})
    again = (await ask(gateway, "退货", "mine"), await gateway.delete(MINE))
    assert [(it.status_code, it.json()["error"]["param"]) for it in again] == [(404, "index")] * 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "JSON"),
        (b"{}", "documents"),
        (b'{"documents": []}', "documents"),
        (b'{"documents": [{"path": "a.md"}]}', "documents.0.text"),
        (b'{"documents": [{"path": "", "text": "x"}]}', "documents.0.path"),
        (b'{"documents": [{"path": "a.md", "text": ""}]}', "no text to index"),
        (b'{"documents": [{"path": "a.md", "text": "\\ud83d"}]}', "half a character"),
    ],
)
async def test_what_is_no_documents_is_refused(gateway: httpx.AsyncClient, body: bytes, told: str) -> None:
    response = await gateway.put(MINE, content=body)
    assert response.status_code == 400
    assert told in response.text
    assert (await gateway.get("/v1/sage/indexes")).json()["data"] == []


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
async def test_names_that_are_none_and_docs_public_are_refused(
    gateway: httpx.AsyncClient, method: str
) -> None:
    for name, status in [("a%20b", 400), (".hidden", 400), ("mine%0A", 400), ("docs-public", 409)]:
        response = await gateway.request(method, f"/v1/sage/indexes/{name}", json={"documents": [MANUAL]})
        assert (response.status_code, response.json()["error"]["param"]) == (status, "name"), name
    assert "quantisation" in (await ask(gateway, "quantisation", "docs-public")).text


async def test_documents_that_are_too_large_are_refused(tmp_path: Path) -> None:
    async for gateway in client_of(tmp_path, api_keys="", max_body_bytes=1000):
        response = await gateway.put(MINE, json={"documents": [MANUAL | {"text": "x" * 1000}]})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")


async def test_a_locked_gateway_wants_a_key(tmp_path: Path) -> None:
    async for gateway in client_of(tmp_path, api_keys="first"):
        for method in ("PUT", "DELETE"):
            assert (await gateway.request(method, MINE, json={"documents": [MANUAL]})).status_code == 401
        headers = {"authorization": "Bearer first"}
        assert (await gateway.put(MINE, json={"documents": [MANUAL]}, headers=headers)).status_code == 200
