"""Bodies that no service could store or send on are refused before one reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from sage_servicekit.app import create_app
from sage_servicekit.bodies import has_half_character
from sage_servicekit.settings import ServiceSettings


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path)


def client_of(home: Path, max_body_bytes: int = 1000) -> TestClient:
    settings = ServiceSettings(home_dir=home, max_body_bytes=max_body_bytes)
    app = create_app("probe", settings, uploads=["/uploads/{name}/parts"])

    @app.post("/echo")
    @app.post("/uploads/{name}/parts")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    return TestClient(app, base_url="http://127.0.0.1")


@pytest.mark.parametrize("text", ["\\ud83d", "\\uDE00", "\\ude00\\ud83d", "a\\ud83d b\\ude00", "\\\\\\ud83d"])
def test_half_a_character_is_refused(client: TestClient, text: str) -> None:
    answer = client.post("/echo", content=f'{{"a": "{text}"}}', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["source"]) == ("invalid_request", "probe")
    assert "an emoji was cut in two" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["\\ud83d\\ude00", "\\\\ud83d", "\\uD83D\\uDE00\\n", "😀", "\\\\\\\\ud83d"])
def test_whole_characters_pass(client: TestClient, text: str) -> None:
    assert client.post("/echo", content=f'{{"a": "{text}"}}'.encode()).status_code == 200


@given(st.lists(st.sampled_from(["\\ud83d", "\\ude00", "\\", "\\\\", '"', "\\u0041", "x", "😀", "\ud83d"])))
def test_it_is_half_a_character_exactly_where_json_makes_one(parts: list[str]) -> None:
    content = '"' + "".join(parts).encode("utf-8", "ignore").decode() + '"'
    try:
        said = json.loads(content)
    except ValueError:
        return
    try:
        said.encode()
    except UnicodeEncodeError:
        assert has_half_character(content.encode())
    else:
        assert not has_half_character(content.encode())


@pytest.mark.parametrize("filler", ["\\n", "\\u0041", "\\ud83d\\ude00", "\\\\ud83d", "\\\\", "x"])
@pytest.mark.parametrize(("end", "status"), [("\\ud83d", 400), ("\\ud83d\\ude00", 200)])
def test_half_a_character_is_found_behind_megabytes(
    tmp_path: Path, filler: str, end: str, status: int
) -> None:
    client = client_of(tmp_path, max_body_bytes=4 * 2**20)
    content = '"' + filler * (2**20 // len(filler)) + end + '"'
    assert client.post("/echo", content=content).status_code == status


def test_a_body_beyond_the_limit_is_refused_and_an_upload_is_not(client: TestClient) -> None:
    refused = client.post("/echo", content=b"x" * 1001)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "payload_too_large")
    assert client.post("/echo", content=b"x" * 1000).json() == {"bytes": 1000}
    assert client.post("/uploads/one/parts", files={"file": b"x" * 5000}).status_code == 200


@pytest.mark.parametrize("path", ["/echo", "/uploads/one/parts/more", "/of/uploads/one/parts"])
def test_no_content_type_makes_an_upload_of_another_body(client: TestClient, path: str) -> None:
    assert client.post(path, files={"file": b"x" * 5000}).status_code == 413
