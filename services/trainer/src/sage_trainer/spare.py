"""One child that has imported its libraries, read the last base's tokenizer and waits for the next job.

It holds no device and no job's memory, trains one job and ends like every other child. It is kept only while
the trainer is idle: a job in training does not share the machine with the next one's libraries.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from sage_servicekit.children import Child
from sage_trainer.messages import ChildOrder

logger = logging.getLogger(__name__)


class Spare:
    """At most one waiting child. Any thread may call."""

    def __init__(self, command: Sequence[str] | None, env: Mapping[str, str], log_path: Path) -> None:
        """`command` starts a child that waits; with None there never is one."""
        self._command = command
        self._env = env
        self._log_path = log_path
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._is_closed = False

    def keep(self, base: str) -> None:
        """Start one if none waits, for a job with this base model above all; it takes any other too.

        A child that cannot be started is not missed: the job starts its own.
        """
        with self._lock:
            if self._is_closed or self._command is None:
                return
            if self._child is not None and not self._child.has_ended():
                return
            self._drop()
            try:
                self._child = Child([*self._command, base], log_path=self._log_path, env=self._env)
            except OSError as error:
                logger.warning("no training process is kept ready: %s", error)

    def take(self, spec: Path, log: Path) -> Child | None:
        """The waiting child, told to train this; None when there is none. The caller owns it from here."""
        with self._lock:
            child, self._child = self._child, None
            if child is None:
                return None
            try:
                if child.has_ended():
                    raise BrokenPipeError("it has ended")
                # Here it can be said that there is no room for it; the child would die of it mute.
                log.parent.mkdir(parents=True, exist_ok=True)
                log.touch()
                child.order(ChildOrder(spec=spec, log=log).model_dump_json().encode())
            except OSError as error:
                logger.warning(
                    "the training process kept ready is of no use (%s); the job starts its own", error
                )
                child.reap()
                return None
            return child

    def close(self) -> None:
        """End the waiting child, for good."""
        with self._lock:
            self._is_closed = True
            self._drop()

    def _drop(self) -> None:
        if self._child is not None:
            self._child.reap()
            self._child = None
