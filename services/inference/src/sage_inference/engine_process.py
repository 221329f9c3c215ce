"""One engine child: started in its own process group, watched, talked to, and ended with all it started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from sage_contracts.errors import EngineFailedError
from sage_inference import adapters, process_group
from sage_inference.engine_log import EngineLog
from sage_inference.models import Adapter
from sage_inference.start_watch import StartWatch, Work

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_PROBE_TIMEOUT_S = 5.0
# From the first fatal line to giving up on the start: the root cause may be a few lines behind it.
_FATAL_GRACE_S = 2.0
_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=32)
# After the child's exit: a grandchild may hold the pipe open, and its lines are not worth a longer wait.
_LAST_LINES_S = 0.3
# An engine runs code that models and their templates bring along: it gets none of our keys.
_SECRETS = frozenset({"SAGE_INTERNAL_TOKEN", "SAGE_API_KEYS", "SAGE_DATABASE_URL", "OPENAI_API_KEY"})
_ORPHAN_GRACE_S = 0.5
_LOG_LIMIT_BYTES = 20 * 1024 * 1024


@dataclass(frozen=True)
class Address:
    """Where an engine listens, and the name that only this engine knows it by."""

    port: int
    nonce: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Launch:
    """What to run. `command` gets the address, because the port is chosen as late as possible."""

    name: str
    command: Callable[[Address], list[str]]
    env: dict[str, str]
    start_deadline_s: float
    start_stall_s: float
    """Without a sign of work for this long it is not waited for until the deadline."""
    stop_grace_s: float
    silence_s: float
    """The longest that it may say nothing to a request: it does one thing after another."""
    log_path: Path
    records: Path
    """Folder for the record that outlives a killed agent."""


class EngineProcess:
    """A running engine. Make one with `start`; `stop` must be called, whatever happened in between."""

    def __init__(
        self,
        launch: Launch,
        address: Address,
        process: asyncio.subprocess.Process,
        output: int,
        record: process_group.GroupRecord,
    ) -> None:
        self.url = address.url
        self.log = EngineLog()
        self.exited = asyncio.Event()
        # Plain HTTP on loopback: without a proxy, and without loading the certificates of the world.
        self.client = httpx.AsyncClient(base_url=self.url, verify=False, trust_env=False, limits=_NO_LIMIT)
        self._launch = launch
        self._nonce = address.nonce
        self._process = process
        self._record = record
        self._drain = asyncio.create_task(self._drain_output(output), name=f"log of {launch.name}")
        self._reap = asyncio.create_task(self._wait(), name=f"wait for {launch.name}")

    @classmethod
    async def start(cls, launch: Launch) -> EngineProcess:
        """Start the child on a port that the system hands out. Returns long before it is ready.

        Raises: OSError, with no process left.
        """
        address = Address(_free_port(), f"sage-{secrets.token_hex(16)}")
        command = [sys.executable, "-m", "sage_inference.launch", *launch.command(address)]
        # A pipe of our own: with asyncio's, waiting for the child would also wait for whoever inherited the
        # pipe, and a vLLM whose server was killed would go unnoticed as long as its core lives.
        output, child_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=_environment(launch),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=child_end,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(child_end)
        logger.info("engine %s: pid %d, port %d", launch.name, process.pid, address.port)
        record = process_group.GroupRecord(launch.records, f"{launch.name}-{process.pid}")
        try:
            record.write(process.pid)
        except BaseException:
            # Nobody else knows of it yet, and without a record nobody ever would.
            await process_group.end(process.pid, _ORPHAN_GRACE_S)
            await process.wait()
            os.close(output)
            raise
        return cls(launch, address, process, output, record)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def phase(self) -> str:
        return self.log.phase

    @property
    def lost_its_port(self) -> bool:
        """Another program took the port between our choice and the child's bind."""
        return self.log.is_port_taken

    async def wait_ready(self) -> None:
        """Return when the child itself answers on its port. Raises: EngineFailedError with the root cause."""
        deadline = time.monotonic() + self._launch.start_deadline_s
        watch = StartWatch(self._launch.start_stall_s, self._work)
        fatal_since: float | None = None
        while not self.exited.is_set():
            if await self._answers():
                self.log.start_serving()
                return
            now = time.monotonic()
            if self.log.is_fatal:
                fatal_since = fatal_since or now
            if fatal_since is not None:
                if now - fatal_since >= _FATAL_GRACE_S:
                    break
            elif now >= deadline:
                raise self._not_ready(f"was not ready after {self._launch.start_deadline_s:.0f} s")
            elif watch.is_stalled():
                raise self._not_ready(
                    f"neither logged nor computed for {self._launch.start_stall_s:.0f} s before it was ready"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exited.wait(), _POLL_S)
        raise self.failure("did not start")

    def _work(self) -> Work:
        return Work(self.log.lines, process_group.cpu_seconds(self._process.pid))

    def _not_ready(self, what: str) -> EngineFailedError:
        return EngineFailedError(
            f"The engine for {self._launch.name} {what} (last phase: {self.phase}). "
            f"Log: {self._launch.log_path}"
        )

    async def _answers(self) -> bool:
        """Healthy, and ours: another program may have taken the port before the child bound it."""
        try:
            health = await self.client.get("/health", timeout=_PROBE_TIMEOUT_S)
            if health.status_code != httpx.codes.OK:
                return False
            served = await self.client.get("/v1/models", timeout=_PROBE_TIMEOUT_S)
            return any(card["id"] == self._nonce for card in served.json()["data"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return False

    def failure(self, what: str) -> EngineFailedError:
        """The error that explains this engine's end, from its log."""
        cause = self.log.root_cause(self._process.returncode)
        return EngineFailedError(
            f"The engine for {self._launch.name} {what}: {cause} (log: {self._launch.log_path})"
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Raises: ModelNotFoundError, EngineFailedError."""
        await adapters.load(self.client, adapter, timeout_s=self._launch.silence_s)

    async def unload_adapter(self, name: str) -> None:
        """Raises: EngineFailedError."""
        await adapters.unload(self.client, name, timeout_s=self._launch.silence_s)

    async def stop(self) -> None:
        """End the group and wait until no process of it lives and the log is complete. Safe to call twice."""
        # What outlives a dead leader has nothing left to finish, and the next engine waits for its memory.
        grace_s = _ORPHAN_GRACE_S if self.exited.is_set() else self._launch.stop_grace_s
        await process_group.end(self._process.pid, min(grace_s, self._launch.stop_grace_s))
        await self._reap
        process_group.reap_orphans(self._process.pid)
        await asyncio.wait({self._drain}, timeout=_LAST_LINES_S)
        self._drain.cancel()
        await asyncio.gather(self._drain, return_exceptions=True)
        await self.client.aclose()
        self._record.remove()

    async def _wait(self) -> None:
        code = await self._process.wait()
        # The last lines explain the exit: let the reader reach them before anybody asks why.
        await asyncio.wait({self._drain}, timeout=_LAST_LINES_S)
        logger.info("engine %s: pid %d ended with %d", self._launch.name, self._process.pid, code)
        self.exited.set()

    async def _drain_output(self, output: int) -> None:
        """Always read, so that a full pipe never blocks the engine; keep a bounded file and the tail."""
        pending = b""
        async with _reading(output) as stream:
            with _new_log(self._launch.log_path) as file:
                while chunk := await stream.read(65536):
                    _write_bounded(file, chunk)
                    *lines, pending = (pending + chunk).replace(b"\r", b"\n").split(b"\n")
                    for line in lines:
                        self.log.add(line.decode(errors="replace"))
                    pending = pending[-65536:]
        self.log.add(pending.decode(errors="replace"))


@contextlib.asynccontextmanager
async def _reading(descriptor: int) -> AsyncIterator[asyncio.StreamReader]:
    """The read end of a pipe as a stream; closed at the end."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader(loop=loop)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream, loop=loop), os.fdopen(descriptor, "rb", 0)
    )
    try:
        yield stream
    finally:
        transport.close()


def _new_log(path: Path) -> BinaryIO:
    """An empty file beside what the engine before this one said; no file at all where there is no room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            # What a crashed engine said must survive the start of the next one.
            path.replace(path.with_name(f"{path.name}.1"))
        return path.open("wb")
    except OSError as error:
        logger.warning("no log of the engine is kept: %s", error)
        return Path(os.devnull).open("wb")


def _write_bounded(file: BinaryIO, chunk: bytes) -> None:
    # A disk that is full must not stop the reading: the ring buffer goes on.
    with contextlib.suppress(OSError):
        if file.tell() > _LOG_LIMIT_BYTES:
            file.seek(0)
            file.truncate()
        file.write(chunk)
        file.flush()


def _environment(launch: Launch) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    return {**inherited, **launch.env, "SAGE_ENGINE_PARENT": str(os.getpid())}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
