"""The bell that wakes workers. It carries an id and no truth: the database decides."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from sage_orchestrator.settings import OrchestratorSettings


class Doorbell(Protocol):
    def ring(self, task: str, work_id: str) -> bool:
        """Tell whoever listens that `work_id` waits; False where so many wait that it has to be done later.

        Raises: the broker's error when it cannot deliver.
        """


class CeleryDoorbell:
    """Rings through Celery. The app is built at the first ring: an idle orchestrator never imports Celery."""

    def __init__(self, settings: OrchestratorSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._celery: Any = None

    def ring(self, task: str, work_id: str) -> bool:
        from sage_servicekit import broker

        with self._lock:
            if self._celery is None:
                self._celery = broker.make_celery(self._settings)
        return broker.ring(self._celery, task, work_id)
