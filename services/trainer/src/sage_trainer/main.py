"""Composition root of the trainer: a Celery worker for the `train` queue."""

from __future__ import annotations

import threading

from sage_contracts.workers import TRAIN_QUEUE, TRAIN_TASK, WorkerBeat
from sage_servicekit import logs
from sage_servicekit.broker import make_celery
from sage_servicekit.machine import find_device
from sage_servicekit.settings import from_env, worker_id
from sage_servicekit.worker import OrchestratorLink, SignOfLife, run_worker
from sage_trainer.runner import TrainerPost, TrainRunner, child_env
from sage_trainer.settings import TrainerSettings
from sage_trainer.spare import Spare


def main() -> int:
    """Run until SIGTERM; returns the exit code."""
    settings = from_env(TrainerSettings)
    logs.configure("trainer", settings.log_level)
    name = worker_id("trainer")
    device = find_device(settings.train_device)
    stopping = threading.Event()
    env, log_path = child_env(settings, device), settings.home.logs / "trainer-spare.log"
    spare = Spare(settings.waiting_child_command, env, log_path)
    link = OrchestratorLink(settings, timeout_s=5.0)
    runner = TrainRunner(TrainerPost(settings, link, name, device, stopping, spare))

    def beat() -> WorkerBeat:
        detail = {"job": runner.current} if runner.current else {}
        return WorkerBeat(
            worker_id=name,
            kind="trainer",
            device=device.name,
            device_total_bytes=device.total_bytes,
            detail=detail,
        )

    celery = make_celery(settings)
    celery.task(runner.run, name=TRAIN_TASK)
    # A short timeout: the file must be touched on time even when the orchestrator hangs.
    life = SignOfLife(settings, OrchestratorLink(settings, timeout_s=2.0), beat)
    life.start()
    try:
        return run_worker(celery, TRAIN_QUEUE, "trainer", stopping=stopping)
    finally:
        spare.close()
        life.stop()
