"""Composition root of the merger: a Celery worker for the `merge` queue."""

from __future__ import annotations

import threading

from sage_contracts.workers import MERGE_QUEUE, MERGE_TASK, WorkerBeat
from sage_merger.runner import MergeRunner, Post
from sage_merger.settings import MergerSettings
from sage_servicekit import logs
from sage_servicekit.broker import make_celery
from sage_servicekit.machine import total_memory_bytes
from sage_servicekit.settings import worker_id
from sage_servicekit.worker import OrchestratorLink, SignOfLife, run_worker


def main() -> int:
    """Run until SIGTERM; returns the exit code."""
    settings = MergerSettings()
    logs.configure("merger", settings.log_level)
    name = worker_id("merger")
    stopping = threading.Event()
    runner = MergeRunner(Post(settings, OrchestratorLink(settings, timeout_s=5.0), name, stopping))
    memory_bytes = total_memory_bytes()

    def beat() -> WorkerBeat:
        detail = {"merge": runner.current_merge} if runner.current_merge else {}
        return WorkerBeat(worker_id=name, kind="merger", device_total_bytes=memory_bytes, detail=detail)

    celery = make_celery(settings)
    celery.task(runner.run, name=MERGE_TASK)
    # A short timeout: the file must be touched on time even when the orchestrator hangs.
    life = SignOfLife(settings, OrchestratorLink(settings, timeout_s=2.0), beat)
    life.start()
    try:
        return run_worker(celery, MERGE_QUEUE, "merger", stopping=stopping)
    finally:
        life.stop()
