"""Bodies that no service could store or send on are refused before one reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
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
    return TestClient(app_of(home, max_body_bytes=max_body_bytes), base_url="http://127.0.0.1")


def app_of(home: Path, **given: float) -> FastAPI:
    settings = ServiceSettings(home_dir=home, **given)
    app = create_app("probe", settings, uploads=["/uploads/{name}/parts"])

    @app.post("/echo")
    @app.post("/uploads/{name}/parts")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    return app


@pytest.mark.parametrize("text", ["\\ud83d", "\\uDE00", "\\ude00\\ud83d", "a\\ud83d b\\ude00", "\\\\\\ud83d"])
def test_half_a_character_is_refused(client: TestClient, text: str) -> None:
    answer = client.post("/echo", content=f'{{"a": "{text}"}}', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["source"]) == ("invalid_request", "probe")
    assert "an emoji was cut in two" in answer.json()["error"]["message"]


@pytest.mark.parametrize("half", ["\ud83d", "\udfff", "\ud83d\ude00"])
def test_bytes_that_are_half_a_character_are_refused(client: TestClient, half: str) -> None:
    """Clients that encode UTF-16 piece by piece send both halves so."""
    content = b'{"a": "%b"}' % half.encode("utf-8", "surrogatepass")
    answer = client.post("/echo", content=content)
    assert answer.status_code == 400 and "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["\\ud83d\\ude00", "\\\\ud83d", "\\uD83D\\uDE00\\n", "😀", "\\\\\\\\ud83d", "\ud7ff\ue000"]
)
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


async def post(app: FastAPI, path: str, parts: AsyncIterator[bytes]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        return await client.post(path, content=parts)


async def part_of(size: int, is_read: asyncio.Event, may_end: asyncio.Event) -> AsyncIterator[bytes]:
    """A body that has all come but its end."""
    yield b"x" * size
    is_read.set()
    await may_end.wait()


async def test_large_bodies_that_come_at_once_have_a_bound_and_small_ones_still_get_in(
    tmp_path: Path,
) -> None:
    app = app_of(tmp_path, max_body_bytes=2**20)
    may_end = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        held = []
        for _ in range(7):
            is_read = asyncio.Event()
            held.append(group.create_task(post(app, "/echo", part_of(2**20, is_read, may_end))))
            await is_read.wait()
        refused = await post(app, "/echo", part_of(100_000, asyncio.Event(), may_end))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        assert refused.headers["x-should-retry"] == "true"
        may_end.set()
        assert (await post(app, "/echo", part_of(1000, asyncio.Event(), may_end))).json() == {"bytes": 1000}
    assert {task.result().status_code for task in held} == {200}
    assert (await post(app, "/echo", part_of(2**20, asyncio.Event(), may_end))).status_code == 200


@pytest.mark.parametrize("path", ["/echo", "/uploads/one/parts"])
async def test_a_body_that_stops_is_given_up(tmp_path: Path, path: str) -> None:
    app = app_of(tmp_path, client_silence_s=0.02)
    answer = await post(app, path, part_of(10, asyncio.Event(), asyncio.Event()))
    assert answer.status_code == 400
    assert "SAGE_CLIENT_SILENCE_S" in answer.json()["error"]["message"]


async def until(is_over: asyncio.Event) -> AsyncIterator[bytes]:
    while not is_over.is_set():
        yield b"x"
        await asyncio.sleep(0)


async def test_an_upload_may_take_its_time_and_another_body_ten_silences(tmp_path: Path) -> None:
    app = app_of(tmp_path, client_silence_s=0.02, max_body_bytes=2**20)
    is_refused = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        upload = group.create_task(post(app, "/uploads/one/parts", until(is_refused)))
        refused = await post(app, "/echo", until(asyncio.Event()))
        is_refused.set()
    assert (refused.status_code, "not whole after 0.2 s" in refused.text) == (400, True)
    assert upload.result().status_code == 200


async def test_an_answer_has_no_deadline(tmp_path: Path) -> None:
    app = app_of(tmp_path, client_silence_s=0.01)

    @app.post("/poll")
    async def poll(request: Request) -> dict[str, str]:
        await request.body()
        try:
            async with asyncio.timeout(0.05):
                return {"next": (await request.receive())["type"]}
        except TimeoutError:
            return {"next": "nothing"}

    is_open = asyncio.Event()

    async def whole() -> AsyncIterator[bytes]:
        yield b"x"
        is_open.set()

    assert (await post(app, "/poll", whole())).json() == {"next": "nothing"}
