"""Any ASGI app as a real server on a free port, for as long as a `with` lasts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any, *, deadline_s: float = 15.0, protocol: Any = "auto") -> Iterator[str]:
    """Yields the server's URL; `protocol` is uvicorn's `http`. Raises: TimeoutError if it does not start."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=protocol, log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until = time.monotonic() + deadline_s
    try:
        while not server.started:
            if time.monotonic() > until or not thread.is_alive():
                raise TimeoutError(f"the server did not start within {deadline_s:g} s")
            thread.join(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def unused_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"
