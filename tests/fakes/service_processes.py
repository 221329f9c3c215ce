"""Gateway and orchestrator as two processes, in front of a fake inference host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.fakes.asgi_server import serving, unused_url
from tests.fakes.fake_openai import FakeOpenAI

TOKEN = "between-us"


@dataclass(frozen=True)
class Process:
    url: str
    pid: int

    def rss_bytes(self) -> int:
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_rss_bytes(self) -> int:
        """The most it ever had."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class GatewayProcess(Process):
    orchestrator: Process
    """The one behind it, where workers report."""
    home: Path


@contextmanager
def running(module: str, url: str, log: Path, **environment: str) -> Iterator[Process]:
    """A service process of its own group, healthy, and gone afterwards."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SAGE_", "OPENAI_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=clean | environment | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 60
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{module} did not start:\n{log.read_text()}")
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        yield Process(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=1).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def running_gateway(folder: Path) -> Iterator[GatewayProcess]:
    """The gateway's process; home and logs are in `folder`."""
    orchestrator_url, gateway_url = unused_url(), unused_url()
    shared = {
        "SAGE_HOME": str(folder / "home"),
        "SAGE_INTERNAL_TOKEN": TOKEN,
        "SAGE_ORCHESTRATOR_URL": orchestrator_url,
        "SAGE_ORCHESTRATOR_PORT": orchestrator_url.rpartition(":")[2],
        "SAGE_GATEWAY_PORT": gateway_url.rpartition(":")[2],
        "SAGE_GATEWAY_URL": gateway_url,
    }
    with (
        serving(FakeOpenAI().app) as inference_url,
        running("sage_orchestrator", orchestrator_url, folder / "orchestrator.log", **shared) as orchestrator,
        running(
            "sage_gateway", gateway_url, folder / "gateway.log", SAGE_INFERENCE_URL=inference_url, **shared
        ) as process,
    ):
        beat = {"worker_id": "trainer@test:1", "kind": "trainer", "device": "cpu"}
        headers = {"X-Sage-Internal-Token": TOKEN}
        httpx.post(f"{orchestrator_url}/internal/workers/beat", json=beat, headers=headers).raise_for_status()
        yield GatewayProcess(process.url, process.pid, orchestrator, folder / "home")
