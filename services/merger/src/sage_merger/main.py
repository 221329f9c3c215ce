"""Composition root of the merger: a Celery worker for the `merge` queue."""

from __future__ import annotations

import threading

from sage_contracts.workers import MERGE_QUEUE, MERGE_TASK, WorkerBeat
from sage_merger.runner import MergerPost, MergeRunner
from sage_merger.settings import MergerSettings
from sage_servicekit import logs
from sage_servicekit.broker import make_celery
from sage_servicekit.machine import Device, total_memory_bytes
from sage_servicekit.settings import from_env, worker_id
from sage_servicekit.worker import OrchestratorLink, SignOfLife, run_worker


def main() -> int:
    """Run until SIGTERM; returns the exit code."""
    settings = from_env(MergerSettings)
    logs.configure("merger", settings.log_level)
    name = worker_id("merger")
    stopping = threading.Event()
    # Merging is never worth a GPU that training or serving may need.
    device = Device("cpu", total_memory_bytes())
    link = OrchestratorLink(settings, timeout_s=5.0)
    runner = MergeRunner(MergerPost(settings, link, name, device, stopping))

    def beat() -> WorkerBeat:
        detail = {"merge": runner.current} if runner.current else {}
        return WorkerBeat(worker_id=name, kind="merger", device_total_bytes=device.total_bytes, detail=detail)

    celery = make_celery(settings)
    celery.task(runner.run, name=MERGE_TASK)
    # A short timeout: the file must be touched on time even when the orchestrator hangs.
    life = SignOfLife(settings, OrchestratorLink(settings, timeout_s=2.0), beat)
    life.start()
    try:
        return run_worker(celery, MERGE_QUEUE, "merger", stopping=stopping)
    finally:
        life.stop()
