"""`python -m sage_orchestrator` as its users start it: on a free port, stopped at the end of a `with`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 60.0


@dataclass(frozen=True)
class OrchestratorProcess:
    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_orchestrator(home: Path, **settings: object) -> Iterator[OrchestratorProcess]:
    """Yields when it is healthy. Raises: RuntimeError with its log when it is not in time."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SAGE_")},
        "SAGE_HOME": str(home),
        "SAGE_ORCHESTRATOR_PORT": str(port),
        **{f"SAGE_{name.upper()}": str(value) for name, value in settings.items()},
    }
    log_path = home / "orchestrator.log"
    home.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sage_orchestrator"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    started = OrchestratorProcess(f"http://127.0.0.1:{port}", process, log_path)
    try:
        _wait_until_healthy(started)
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_until_healthy(started: OrchestratorProcess) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{started.url}/healthz", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if started.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the orchestrator did not start:\n{started.log()}")
        time.sleep(0.05)
