"""Run an app with uvicorn the same way in every service."""

from __future__ import annotations

import resource
from contextlib import suppress

from fastapi import FastAPI


def run(app: FastAPI, host: str, port: int, *, graceful_shutdown_s: int = 10) -> None:
    """Serve until SIGTERM or SIGINT; open streams get `graceful_shutdown_s` to end."""
    import uvicorn

    from sage_servicekit.patience import patient_for

    raise_file_limit()
    uvicorn.run(
        app,
        host=host,
        port=port,
        http=patient_for(app.state.settings.client_silence_s),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=graceful_shutdown_s,
        timeout_keep_alive=75,
    )


def raise_file_limit() -> None:
    """As many open connections as this process may have: shells give 1024, and an answer may need two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS names no limit and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
