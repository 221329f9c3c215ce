"""The command line against a fake gateway: a real server that speaks the real routes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.fakes.fake_gateway import build_app
from typer.testing import CliRunner

from sage_cli.main import app

START_TIMEOUT_S = 30.0
SAGE_VARIABLES = ("SAGE_CHAT_BACKEND", "SAGE_CHAT_FINETUNE_MODEL", "SAGE_ORCHESTRATOR_URL", "SAGE_API_KEYS")

Sage = Callable[..., Any]


@pytest.fixture(scope="session")
def gateway_process() -> Iterator[str]:
    """The URL of a fake gateway that all tests share, in a thread: a process costs seconds to import."""
    server = uvicorn.Server(uvicorn.Config(build_app(), port=0, log_config=None))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert time.monotonic() < deadline, "the fake gateway does not start"
            threading.Event().wait(0.01)
        yield url
        server.should_exit = True
        thread.join(timeout=START_TIMEOUT_S)


@pytest.fixture
def gateway(gateway_process: str) -> str:
    """The URL of the fake gateway, with nothing in it."""
    httpx.post(f"{gateway_process}/reset").raise_for_status()
    return gateway_process


@pytest.fixture
def sage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sage:
    """Runs `sage …` in this process with a home of its own; nothing is ever started on its behalf."""
    monkeypatch.setenv("SAGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SAGE_AUTOSTART", "0")
    monkeypatch.setenv("SAGE_GATEWAY_URL", "http://127.0.0.1:9")
    for name in SAGE_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*words: str, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, list(words), input=stdin, prog_name="sage")

    return run


@pytest.fixture
def online(sage: Sage, gateway: str, monkeypatch: pytest.MonkeyPatch) -> Sage:
    """`sage …` with the fake gateway behind it."""
    monkeypatch.setenv("SAGE_GATEWAY_URL", gateway)
    return sage


@pytest.fixture
def requests(gateway: str) -> Callable[[str], list[dict[str, Any]]]:
    """What the fake gateway received under a path."""

    def received(path: str) -> list[dict[str, Any]]:
        return [entry for entry in httpx.get(f"{gateway}/requests").json() if entry["path"] == path]

    return received
