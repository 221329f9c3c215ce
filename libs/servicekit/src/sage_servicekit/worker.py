"""What trainer and merger share: the loop, the sign of life, the line to the orchestrator."""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from sage_contracts.errors import (
    ConflictError,
    DeviceBusyError,
    NotFoundError,
    SageError,
    ServiceUnavailableError,
    StorageFullError,
    UpstreamError,
    from_response,
)
from sage_contracts.workers import ClaimRequest, WorkerBeat
from sage_servicekit.machine import return_free_memory
from sage_servicekit.settings import ServiceSettings

logger = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=BaseModel)

_RETRY_S = 2.0
_LEAVING_S = 6.0
"""How long a worker that was told to stop still tries to say how its attempt ended."""


class OrchestratorLink:
    """Typed calls to the orchestrator's /internal routes. Safe to share between threads.

    On the standard library's client: an idle worker that imports httpx is 7 MB larger, and a call every two
    seconds needs no pool.
    """

    def __init__(self, settings: ServiceSettings, *, timeout_s: float = 10.0) -> None:
        self._url = settings.orchestrator_url.rstrip("/")
        self._headers = {"content-type": "application/json", **settings.internal_headers}
        self._timeout_s = timeout_s

    def post(self, path: str, message: BaseModel, reply: type[Reply]) -> Reply:
        """POST a message and read the typed reply. Raises: SageError as the orchestrator raised it."""
        content = self._send(path, message)
        try:
            return reply.model_validate_json(content)
        except ValidationError as error:
            raise UpstreamError(
                f"The orchestrator answered {path} with no {reply.__name__}: {error}"
            ) from error

    def tell(self, path: str, message: BaseModel) -> None:
        """POST a message whose reply does not matter. Raises: SageError."""
        self._send(path, message)

    def _send(self, path: str, message: BaseModel) -> bytes:
        target = urlsplit(self._url + path)
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = kind(target.hostname or "", target.port, timeout=self._timeout_s)
        try:
            connection.request("POST", target.path, message.model_dump_json().encode(), self._headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServiceUnavailableError(
                f"The orchestrator at {self._url} does not answer {path}: {error or type(error).__name__}"
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise from_response(response.status, content, retry_after=response.getheader("retry-after"))
        return content


def claim(
    link: OrchestratorLink,
    path: str,
    request: ClaimRequest,
    reply: type[Reply],
    *,
    stopping: threading.Event,
    patience_s: float,
) -> Reply | None:
    """Ask for the work behind a doorbell. None: somebody else has it, or nothing can be had now.

    Leaving empty-handed loses nothing: what stays queued is rung for again by the orchestrator's sweeper.
    """
    left_s = patience_s
    while not stopping.is_set():
        try:
            return link.post(path, request, reply)
        except (ConflictError, NotFoundError) as error:
            logger.info("%s: not for this worker: %s", path, error)
            return None
        except SageError as error:
            wait_s = (error.retry_after_s or _RETRY_S) if isinstance(error, DeviceBusyError) else _RETRY_S
            if not error.retryable or wait_s > left_s:
                logger.warning("%s: left in the queue: %s", path, error)
                return None
            logger.info("%s: asking again in %.0f s: %s", path, wait_s, error)
            stopping.wait(wait_s)
            left_s -= wait_s
    return None


def until_accepted(
    send: Callable[[], object],
    what: str,
    *,
    stopping: threading.Event,
    patience_s: float,
    retry_s: float = _RETRY_S,
) -> bool:
    """Send how an attempt ended until the orchestrator has it. False: it is not wanted, or never got through.

    What never gets through is not lost either: the lease expires and the next attempt finds what was written.
    """
    left_s = patience_s
    while True:
        try:
            send()
            return True
        except SageError as error:
            if stopping.is_set():
                left_s = min(left_s, _LEAVING_S)
            # The base class is what an orchestrator in trouble answers, and its disk may get room again.
            may_pass = error.retryable or type(error) is SageError or isinstance(error, StorageFullError)
            if not may_pass:
                logger.warning("%s refused: %s", what, error)
                return False
            if left_s <= 0:
                logger.error("%s given up: %s", what, error)
                return False
            logger.warning("%s, trying again in %.0f s: %s", what, retry_s, error)
        time.sleep(retry_s)
        left_s -= retry_s


_BEAT = "/internal/workers/beat"
_FIRST_BEATS_S = 0.5
"""Between those of a worker that was never heard: it may have started before the orchestrator."""


class SignOfLife:
    """Beats to the orchestrator every `interval_s` until stopped, and touches `<run>/<kind>.alive`.

    The file is there once the orchestrator has heard the worker: who waits for it finds both of one mind.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        link: OrchestratorLink,
        beat: Callable[[], WorkerBeat],
        *,
        interval_s: float = 5.0,
    ) -> None:
        self._beat = beat
        self._link = link
        self._interval_s = interval_s
        self._path = settings.home.run / f"{beat().kind}.alive"
        self._stop = threading.Event()
        self._is_heard = True
        self._thread = threading.Thread(target=self._run, name="sign-of-life", daemon=True)

    def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=15)
        self._path.unlink(missing_ok=True)
        with suppress(SageError):  # else it is missed after a while
            self._link.tell(_BEAT, self._beat().model_copy(update={"is_leaving": True}))

    def _run(self) -> None:
        was_ever_heard = False
        while not self._stop.is_set():
            self._tell()
            was_ever_heard = was_ever_heard or self._is_heard
            if was_ever_heard:
                with suppress(OSError):  # a full disk is no worker's end
                    self._path.touch()
            self._stop.wait(self._interval_s if was_ever_heard else min(_FIRST_BEATS_S, self._interval_s))

    def _tell(self) -> None:
        # A silent orchestrator is not the worker's end: it says so once and beats on.
        try:
            self._link.tell(_BEAT, self._beat())
        except SageError as error:
            if self._is_heard:
                logger.warning("beats are not delivered: %s", error)
            self._is_heard = False
        else:
            if not self._is_heard:
                logger.info("beats are delivered again")
            self._is_heard = True


def run_worker(celery: Any, queue: str, name: str, *, stopping: threading.Event | None = None) -> int:
    """Consume one queue, one task at a time, until SIGTERM; returns the exit code.

    The task runs in a thread, so the main loop stays free for the broker and signals; heavy work is in a
    child process anyway. `stopping` is set when the signal arrives; the worker then waits for its task.
    """
    from celery import signals

    def on_shutdown(**_: Any) -> None:
        if stopping is not None:
            stopping.set()

    def on_idle(**_: Any) -> None:
        return_free_memory()

    signals.worker_shutting_down.connect(on_shutdown, weak=False)
    signals.worker_ready.connect(on_idle, weak=False)
    signals.task_postrun.connect(on_idle, weak=False)
    # Not `worker_main`: it imports every command that Celery has.
    worker = celery.Worker(
        hostname=f"{name}@{_hostname()}",
        queues=[queue],
        pool_cls="threads",
        concurrency=1,
        loglevel="INFO",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _hostname() -> str:
    import socket

    return socket.gethostname()
