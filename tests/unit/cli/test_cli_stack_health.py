"""When a worker counts as ready: as `sage status` sees it, so that the first look after `sage up` agrees."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sage_cli.stack.health import is_healthy
from sage_cli.stack.parts import Part, embedded_parts
from sage_contracts.home import Home
from sage_contracts.workers import INTERNAL_TOKEN_HEADER, WorkerSeen

TOKEN = "secret"
Hears = Callable[..., None]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("SAGE_INTERNAL_TOKEN", TOKEN)
    home = Home(tmp_path)
    home.run.mkdir()
    return home


@pytest.fixture
def orchestrator() -> Iterator[tuple[int, list[WorkerSeen]]]:
    """The port of one that lists these workers to whoever knows the token."""
    workers: list[WorkerSeen] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers[INTERNAL_TOKEN_HEADER] == TOKEN and self.path == "/internal/workers"
            data = [worker.model_dump(mode="json") for worker in workers]
            body = json.dumps({"object": "list", "data": data, "has_more": False}).encode()
            self.send_response(200 if is_known else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], workers
        server.shutdown()
        thread.join()


def trainer(orchestrator_port: int) -> Part:
    ports = {"orchestrator": orchestrator_port, "inference": 1, "gateway": 2, "tensorboard": 3}
    parts = embedded_parts(ports, "127.0.0.1", Path("output"))
    return next(part for part in parts if part.name == "trainer")


def seen(**fields: Any) -> WorkerSeen:
    given = {"worker_id": "w", "kind": "trainer", "last_seen": time.time(), "is_up": True, **fields}
    return WorkerSeen.model_validate(given)


def test_a_worker_is_ready_once_the_orchestrator_has_heard_of_it(
    home: Home, orchestrator: tuple[int, list[WorkerSeen]]
) -> None:
    port, workers = orchestrator
    part = trainer(port)
    (home.run / "trainer.alive").touch()
    assert not is_healthy(part, home)
    workers.append(seen(kind="merger"))
    assert not is_healthy(part, home)
    workers.append(seen())
    assert is_healthy(part, home)
    (home.run / "trainer.alive").unlink()
    assert not is_healthy(part, home)


@pytest.mark.parametrize("fields", [{"is_up": False}, {"last_seen": 0.0}])
def test_the_worker_of_an_earlier_stack_is_not_this_ones(
    home: Home, orchestrator: tuple[int, list[WorkerSeen]], fields: dict[str, Any]
) -> None:
    port, workers = orchestrator
    (home.run / "trainer.alive").touch()
    workers.append(seen(**fields))
    assert not is_healthy(trainer(port), home, since=1.0)


def test_no_worker_is_ready_without_an_orchestrator(home: Home) -> None:
    (home.run / "trainer.alive").touch()
    assert not is_healthy(trainer(1), home)
