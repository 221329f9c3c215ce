"""Real workers for integration tests: a broker, an orchestrator, worker processes, all on free ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.orchestrator_stub import Records, StubServer

from sage_contracts.workers import TRAIN_TASK
from sage_servicekit.broker import make_celery, ring
from sage_servicekit.settings import ServiceSettings

FAKE_CHILD = Path(__file__).with_name("fake_train_child.py")
TOKEN = "between-us"


def wait_until(what: Callable[[], bool], why: str, timeout_s: float = 30.0) -> None:
    """Poll until `what()`; for what has no event to wait on, such as processes and files."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {why}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A real redis-server on a free port; can be stopped and started again there."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary is not None
        self._folder.mkdir(exist_ok=True)
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        self._process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
        wait_until(lambda: _answers(self.port), "redis-server answers")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=15)
            self._process = None


@contextlib.contextmanager
def broker(kind: str, folder: Path) -> Iterator[tuple[str, RedisServer | None]]:
    """The broker's URL: a real redis-server of its own, or folders below the home."""
    if kind == "folders":
        yield "filesystem://", None
        return
    server = RedisServer(folder)
    server.start()
    try:
        yield server.url, server
    finally:
        server.stop()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
    except OSError:
        return False


@dataclass
class Rig:
    """One home with its orchestrator and the workers started in it."""

    home: Path
    broker_url: str
    records: Records
    server: StubServer
    redis: RedisServer | None = None
    env: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = ServiceSettings(home_dir=self.home, broker_url=self.broker_url)
        self._celery = make_celery(settings)

    def ring(self, work_id: str, task: str = TRAIN_TASK) -> None:
        ring(self._celery, task, work_id)

    def start_worker(self, module: str = "sage_trainer", **env: str) -> subprocess.Popen[bytes]:
        log = self.home / f"{module}-{len(self.workers)}.log"
        full = {
            **os.environ,
            "SAGE_HOME": str(self.home),
            "SAGE_BROKER_URL": self.broker_url,
            "SAGE_ORCHESTRATOR_URL": self.server.url,
            "SAGE_INTERNAL_TOKEN": TOKEN,
            "SAGE_REPORT_INTERVAL_S": "0.2",
            "SAGE_TRAIN_DEVICE": "cpu",
            "SAGE_TRAIN_CHILD_COMMAND": f'["{sys.executable}", "{FAKE_CHILD}"]',
            **self.env,
            **env,
        }
        with log.open("wb") as stream:
            worker = subprocess.Popen([sys.executable, "-m", module], env=full, stdout=stream, stderr=stream)
        self.workers.append(worker)
        return worker

    def child_pid(self, name: str) -> int:
        path = self.home / "finetune_output" / name / "child.pid"
        wait_until(lambda: path.exists() and path.read_text() != "", f"the child of {name} runs")
        return int(path.read_text())

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.home.glob("*.log")))

    def close(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(timeout=40)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._celery.close()


@contextlib.contextmanager
def rig(kind: str, folder: Path) -> Iterator[Rig]:
    """A rig that is taken down completely, whatever happens in the test."""
    home = folder / "home"
    home.mkdir()
    records = Records()
    server = StubServer(records, home, TOKEN)
    with broker(kind, folder / "redis") as (url, redis):
        server.start()
        made = Rig(home, url, records, server, redis)
        try:
            yield made
        finally:
            made.close()
            server.stop()
            print(made.logs())
