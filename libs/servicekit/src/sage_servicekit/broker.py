"""The Celery app behind the doorbells: Redis in containers, folders on disk when embedded."""

from __future__ import annotations

from typing import Any

from sage_contracts.workers import MERGE_QUEUE, MERGE_TASK, TRAIN_QUEUE, TRAIN_TASK
from sage_servicekit.settings import ServiceSettings


def make_celery(settings: ServiceSettings) -> Any:
    """A Celery app that rings and answers doorbells. No result backend: the database has the truth."""
    from celery import Celery

    app = Celery("sage", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        task_create_missing_queues=True,
        task_routes={TRAIN_TASK: {"queue": TRAIN_QUEUE}, MERGE_TASK: {"queue": MERGE_QUEUE}},
        broker_connection_retry_on_startup=True,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.2, "interval_max": 0.2},
    )
    if settings.broker_url.startswith("filesystem:"):
        app.conf.broker_transport_options = _queue_folders(settings)
    return app


def _queue_folders(settings: ServiceSettings) -> dict[str, Any]:
    root = settings.home.state / "broker"
    queue, control = root / "queue", root / "control"
    queue.mkdir(parents=True, exist_ok=True)
    control.mkdir(parents=True, exist_ok=True)
    # In and out are one folder: every process of the embedded stack both rings and listens there.
    return {
        "data_folder_in": str(queue),
        "data_folder_out": str(queue),
        "control_folder": str(control),
        "store_processed": False,
    }


def ring(app: Any, task: str, argument: str) -> None:
    """Send a doorbell: the id alone. Raises the broker's error when it cannot be delivered."""
    app.send_task(task, args=[argument], retry=True)
