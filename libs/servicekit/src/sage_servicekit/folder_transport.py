"""A broker of plain folders: the embedded stack's doorbells, one file each, without a server.

Kombu's own file-system transport writes messages and exchange tables in place, so that a process which looks
at the wrong moment reads an empty file, and its worker dies of the JSON error. Here messages appear whole,
and what is rung for again and again while all workers are busy waits once.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from sage_contracts.home import write_whole

SUFFIX = ".msg"


class Channel(virtual.Channel):  # type: ignore[misc]
    """Each queue is a folder below `transport_options["folder"]`; names sort by time of sending."""

    def _queue_folder(self, queue: str) -> Path:
        if queue != Path(queue).name:
            raise ValueError(f"{queue!r} cannot name a queue: it is no plain file name")
        return Path(self.connection.client.transport_options["folder"]) / queue

    def _waiting(self, queue: str) -> list[Path]:
        try:
            return sorted(path for path in self._queue_folder(queue).iterdir() if path.suffix == SUFFIX)
        except FileNotFoundError:
            return []

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        ending = f"-{_meaning(message)}{SUFFIX}"
        # A worker asks what there is to do only after it took a message: one that is still here will do.
        if not any(path.name.endswith(ending) for path in self._waiting(queue)):
            write_whole(self._queue_folder(queue) / f"{time.time_ns():020d}{ending}", dumps(message))

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        for path in self._waiting(queue):
            try:
                content = path.read_bytes()
                # The removal decides: of two workers that read one message, one succeeds.
                path.unlink()
            except FileNotFoundError:
                continue
            return loads(bytes_to_str(content))
        raise Empty

    def _size(self, queue: str) -> int:
        return len(self._waiting(queue))

    def _purge(self, queue: str) -> int:
        waiting = self._waiting(queue)
        for path in waiting:
            path.unlink(missing_ok=True)
        return len(waiting)


def _meaning(message: dict[str, Any]) -> str:
    """The same for all messages that ask for one task with the same arguments."""
    asked = [message.get("headers", {}).get("task"), message["body"]]
    return hashlib.sha256(dumps(asked).encode()).hexdigest()[:32]


class Transport(virtual.Transport):  # type: ignore[misc]
    Channel = Channel

    driver_type = "sage-folders"
    driver_name = "sage-folders"
    polling_interval = 0.25

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {}  # no host to warn about

    def driver_version(self) -> str:
        return "1"

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        # A worker looks whether it should stop between two drains: the shorter, the sooner it does.
        super().drain_events(connection, None if timeout is None else min(timeout, 2 * self.polling_interval))
