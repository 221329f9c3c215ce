"""Who connects and asks nothing loses the connection; who waits for an answer keeps it."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse
from tests.fakes.asgi_server import serving

from sage_servicekit.patience import patient_for

SILENCE_S = 0.05
QUESTION = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def build_app(may_end: threading.Event) -> FastAPI:
    app = FastAPI()

    @app.api_route("/", methods=["GET", "POST"])
    async def answer() -> str:
        return "done"

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"begun "
            await asyncio.to_thread(may_end.wait)
            yield b"ended"

        return StreamingResponse(parts())

    return app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build_app(threading.Event()), protocol=patient_for(SILENCE_S)) as url:
        yield url


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port))
    connection.settimeout(20)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    said = b""
    while part := connection.recv(65536):
        said += part
    return said


@pytest.mark.parametrize("said", [b"", b"G", QUESTION])
def test_who_asks_nothing_whole_is_let_go(url: str, said: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(said)
        assert everything(connection) == b""


@pytest.mark.parametrize("more", [b"G", QUESTION])
def test_half_a_request_after_an_answer_ends_too(url: str, more: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(QUESTION + b"\r\n" + more)
        assert everything(connection).endswith(b'"done"')


def test_the_rest_of_a_body_that_nobody_reads_ends_too(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
        assert everything(connection).endswith(b'"done"')


def test_an_answer_outlives_every_deadline_and_its_connection_is_used_again() -> None:
    may_end = threading.Event()
    with (
        serving(build_app(may_end), protocol=patient_for(SILENCE_S)) as url,
        httpx.Client(base_url=url, trust_env=False) as client,
        client.stream("GET", "/stream") as answer,
    ):
        with connect(url) as idle:
            idle.sendall(QUESTION + b"\r\n" + QUESTION)
            everything(idle)  # the longest deadline
        may_end.set()
        assert answer.read() == b"begun ended"
        assert client.get("/").text == '"done"'


def test_a_server_may_have_as_many_connections_as_the_system_lets_it() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(128, most)
    program = (
        "import resource; from sage_servicekit.serve import raise_file_limit;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({few}, {most})); raise_file_limit();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(said.stdout) == most
