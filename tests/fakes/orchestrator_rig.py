"""The real orchestrator on a temporary SQLite, with clock and bell in the test's hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import event
from starlette.testclient import TestClient

from sage_orchestrator.database import Database
from sage_orchestrator.main import Orchestrator, build_app
from sage_orchestrator.rows import Base
from sage_orchestrator.settings import OrchestratorSettings

GIB = 2**30


@dataclass
class HandClock:
    """Stands still until it is moved."""

    now: float = 1_800_000_000.0
    passed_s: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.passed_s += seconds

    def set_by(self, seconds: float) -> None:
        """As somebody sets it, or as it is after a sleep: no time has passed."""
        self.now += seconds


@dataclass
class ListBell:
    """A doorbell that writes down who was rung for; it can be broken, as a broker may be, and full."""

    rung: list[tuple[str, str]] = field(default_factory=list)
    is_down: bool = False
    is_full: bool = False

    def ring(self, task: str, work_id: str) -> bool:
        if self.is_down:
            raise ConnectionError("the broker is down")
        if not self.is_full:
            self.rung.append((task, work_id))
        return not self.is_full

    def take(self) -> list[str]:
        """The ids rung for since the last call."""
        ids = [work_id for _, work_id in self.rung]
        self.rung.clear()
        return ids


@dataclass
class Rig:
    """Requests as clients and workers make them. No thread runs: `sweep` does a round of all of them."""

    app: FastAPI
    http: TestClient
    clock: HandClock
    bell: ListBell
    home: Path

    @property
    def parts(self) -> Orchestrator:
        parts: Orchestrator = self.app.state.orchestrator
        return parts

    def reset(self) -> None:
        """As if newly made, at a hundredth of the cost."""
        empty(self.parts.database)
        for path in self.home.iterdir():
            if path.name != "state":
                shutil.rmtree(path)
        self.clock.now, self.bell.is_down, self.bell.is_full = HandClock.now, False, False
        self.parts.sweeper.jumps.since_last()
        self.bell.take()
        self.http.headers.pop("X-Sage-Internal-Token", None)

    def sweep(self) -> list[str]:
        """One round of everything that is done by the clock, as if others had come before it in time; the
        ids it rang for."""
        self.parts.sweeper.rounds.end()
        return self.sweep_after_silence()

    def sweep_after_silence(self) -> list[str]:
        """The same, and there was none since the last one."""
        self.parts.sweeper.sweep()
        self.parts.sweeps.tend()
        self.parts.sweeper.ring_due()
        return self.bell.take()

    @contextmanager
    def statements(self) -> Iterator[list[str]]:
        """The SQL of all that only reads in the block."""
        told: list[str] = []

        def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            told.append(statement)

        engine = self.parts.database.engine
        event.listen(engine, "before_cursor_execute", hear)
        try:
            yield told
        finally:
            event.remove(engine, "before_cursor_execute", hear)

    def get(self, path: str, *, status: int = 200, **params: Any) -> Any:
        response = self.http.get(path, params=params)
        assert response.status_code == status, response.text
        return response.json()

    def post(self, path: str, body: Any = None, *, status: int = 200) -> Any:
        response = self.http.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json() if response.content else None

    def upload(self, content: bytes, filename: str = "rows.jsonl", purpose: str = "fine-tune") -> str:
        response = self.http.post("/v1/files", files={"file": (filename, content)}, data={"purpose": purpose})
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def create_job(self, **fields: Any) -> Any:
        """A job for `code` with its own data unless the test says otherwise."""
        body: dict[str, Any] = {"model": "smollm2-135m"}
        if "training_file" not in fields:
            body["sage"] = {"task": "code"}
        return self.post("/v1/fine_tuning/jobs", body | fields)

    def job(self, job_id: str) -> Any:
        return self.get(f"/v1/fine_tuning/jobs/{job_id}")

    def claim(self, job_id: str, worker: str = "w1", *, status: int = 200, **fields: Any) -> Any:
        body = {"worker_id": worker, "device": "cpu", "device_total_bytes": 8 * GIB} | fields
        return self.post(f"/internal/jobs/{job_id}/claim", body, status=status)

    def report(
        self, job_id: str, attempt: int = 1, worker: str = "w1", *, status: int = 200, **fields: Any
    ) -> Any:
        body = {"worker_id": worker, "attempt": attempt} | fields
        return self.post(f"/internal/jobs/{job_id}/events", body, status=status)

    def finish(
        self,
        job_id: str,
        outcome: str = "succeeded",
        attempt: int = 1,
        worker: str = "w1",
        *,
        status: int = 200,
        **fields: Any,
    ) -> Any:
        body: dict[str, Any] = {"worker_id": worker, "attempt": attempt, "outcome": outcome}
        if outcome == "succeeded":
            body |= {"base_model": "base_models/smollm2-135m", "adapter_path": f"adapters/{job_id}"}
        return self.post(f"/internal/jobs/{job_id}/finish", body | fields, status=status)

    def train(self, **fields: Any) -> Any:
        """A job from creation to success."""
        job_id = self.create_job(**fields)["id"]
        self.claim(job_id)
        return self.finish(job_id)

    def messages(self, job_id: str) -> list[str]:
        """What people read, oldest first."""
        events = self.get(f"/v1/fine_tuning/jobs/{job_id}/events", limit=1000, order="asc")
        return [each["message"] for each in events["data"]]

    def lease(self, holder: str, size_bytes: int, *, status: int = 200, **fields: Any) -> Any:
        body = {
            "holder": holder,
            "purpose": "inference",
            "device": "cpu",
            "bytes": size_bytes,
            "total_bytes": 8 * GIB,
            "label": "serving code@1",
        }
        return self.post("/internal/devices/lease", body | fields, status=status)


def empty(database: Database) -> None:
    """Every table as after the first start."""
    with database.write() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())


def rows(count: int = 12) -> bytes:
    """JSON Lines in OpenAI's format."""
    lines = (
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {number}?"},
                    {"role": "assistant", "content": f"A number, {number}."},
                ]
            }
        )
        for number in range(count)
    )
    return "\n".join(lines).encode()


@contextmanager
def open_rig(home: Path, *, now: float = HandClock.now, **settings: Any) -> Iterator[Rig]:
    clock, bell = HandClock(now), ListBell()
    app = build_app(
        OrchestratorSettings(home_dir=home, **settings),
        clock=clock,
        steady=lambda: clock.passed_s,
        doorbell=bell,
    )
    parts: Orchestrator = app.state.orchestrator
    parts.prepare()
    # Without `with`, the client runs no lifespan: no thread, no upgrade, nothing but requests.
    client = TestClient(app, "http://127.0.0.1", raise_server_exceptions=False)
    try:
        yield Rig(app, client, clock, bell, home)
    finally:
        client.close()
        parts.stop()
