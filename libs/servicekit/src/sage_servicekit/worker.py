"""What trainer and merger share: the loop, the sign of life, the line to the orchestrator."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel

from sage_contracts.errors import ServiceUnavailableError, from_response
from sage_contracts.workers import WorkerBeat
from sage_servicekit.settings import ServiceSettings

logger = logging.getLogger(__name__)

Reply = TypeVar("Reply", bound=BaseModel)


class OrchestratorLink:
    """Typed calls to the orchestrator's /internal routes. Safe to share between threads."""

    def __init__(self, settings: ServiceSettings, *, timeout_s: float = 10.0) -> None:
        self._client = httpx.Client(
            base_url=settings.orchestrator_url, headers=settings.internal_headers, timeout=timeout_s
        )

    def post(self, path: str, message: BaseModel, reply: type[Reply]) -> Reply:
        """POST a message and read the typed reply. Raises: SageError as the orchestrator raised it."""
        return reply.model_validate_json(self._send(path, message).content)

    def tell(self, path: str, message: BaseModel) -> None:
        """POST a message whose reply does not matter. Raises: SageError."""
        self._send(path, message)

    def _send(self, path: str, message: BaseModel) -> httpx.Response:
        try:
            response = self._client.post(
                path, content=message.model_dump_json(), headers={"content-type": "application/json"}
            )
        except httpx.HTTPError as error:
            raise ServiceUnavailableError(
                f"The orchestrator at {self._client.base_url} does not answer {path}: {error}"
            ) from error
        if response.is_error:
            raise from_response(
                response.status_code, response.content, retry_after=response.headers.get("retry-after")
            )
        return response

    def close(self) -> None:
        self._client.close()


class SignOfLife:
    """Touches `<run>/<kind>.alive` and beats to the orchestrator every `interval_s` until stopped."""

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
        self._thread = threading.Thread(target=self._run, name="sign-of-life", daemon=True)

    def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=15)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._path.touch()
            try:
                self._link.tell("/internal/workers/beat", self._beat())
            except Exception as error:
                # A silent orchestrator is not the worker's end: it says so and beats on.
                logger.warning("beat not delivered: %s", error)
            self._stop.wait(self._interval_s)


def run_worker(celery: Any, queue: str, name: str) -> None:
    """Consume one queue, one task at a time, until SIGTERM.

    The task runs in a thread, so the main loop stays free for the broker and signals; heavy work is in a
    child process anyway.
    """
    celery.worker_main(
        [
            "worker",
            f"--queues={queue}",
            "--pool=threads",
            "--concurrency=1",
            f"--hostname={name}@%h",
            "--without-gossip",
            "--without-mingle",
            "--loglevel=INFO",
        ]
    )
