"""Run an app with uvicorn the same way in every service."""

from __future__ import annotations

from fastapi import FastAPI


def run(app: FastAPI, host: str, port: int, *, graceful_shutdown_s: int = 10) -> None:
    """Serve until SIGTERM or SIGINT; open streams get `graceful_shutdown_s` to end."""
    import uvicorn

    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=graceful_shutdown_s,
        timeout_keep_alive=75,
    )
