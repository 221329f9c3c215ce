"""A real PostgreSQL server of the test's own, from the binaries on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from tests.fakes.orchestrator_process import free_port

START_S = 60.0


@contextmanager
def running_postgres() -> Iterator[str]:
    """Yields a URL (`postgresql://…`). Raises: RuntimeError with the server's log when it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="sage-postgres-"))
    # The server refuses to run as root; Debian's package brings a user for it.
    identity: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    if identity:
        shutil.chown(folder, "postgres")
    port = free_port()
    data, log_path = folder / "data", folder / "log"
    initialise = [_binary("initdb"), "-D", data, "-U", "sage", "--auth=trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(initialise, check=True, capture_output=True, cwd=folder, **identity)
    serve = [_binary("postgres"), "-D", data, "-p", str(port), "-k", folder, "-c", "fsync=off"]
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            serve, stdout=log, stderr=log, cwd=folder, start_new_session=True, **identity
        )
    url = f"postgresql://sage@127.0.0.1:{port}/postgres"
    try:
        _wait_until_ready(url, server, log_path)
        yield url
    finally:
        # SIGINT is its fast shutdown: open connections are closed.
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
        shutil.rmtree(folder)


def _binary(name: str) -> Path | str:
    found = shutil.which(name)
    if found:
        return found
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(url, connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log_path.read_text(errors="replace")) from None
        time.sleep(0.05)
