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
        accept_content=["json"],
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        task_create_missing_queues=True,
        task_routes={TRAIN_TASK: {"queue": TRAIN_QUEUE}, MERGE_TASK: {"queue": MERGE_QUEUE}},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Nobody sends remote control or reads task events: the orchestrator's API does both jobs.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        task_publish_retry_policy={"max_retries": 1, "interval_start": 0.2, "interval_max": 0.2},
        **(_folders(settings) if settings.broker_url.startswith("filesystem:") else _redis()),
    )
    return app


# A doorbell held back by a busy worker is one that an idle worker does not hear, so both take one at a time.


def _redis() -> dict[str, Any]:
    # Acknowledged early: Redis hands what stays unacknowledged for its visibility timeout to a second worker
    # while the first still trains. A doorbell that is lost instead is rung again by the orchestrator.
    return {"task_acks_late": False, "worker_disable_prefetch": True}


def _folders(settings: ServiceSettings) -> dict[str, Any]:
    # Folders have no such timeout and Celery cannot disable their prefetch: acknowledging late does it.
    return {
        "task_acks_late": True,
        "broker_transport": "sage_servicekit.folder_transport:Transport",
        "broker_transport_options": {"folder": str(settings.home.state / "broker")},
    }


MOST_WAITING = 50
"""Doorbells in a queue. Redis has room for more, but lets no worker start once it is full; and of bells that
nobody needs any more, a worker answers one or two a second before it comes to a new one."""


def ring(app: Any, task: str, argument: str) -> bool:
    """Send a doorbell: the id alone. False: the workers have enough of them to answer, and none was sent.

    Raises the broker's error when it cannot be delivered.
    """
    if _waiting(app, app.conf.task_routes[task]["queue"]) >= MOST_WAITING:
        return False
    app.send_task(task, args=[argument], retry=True)
    return True


def _waiting(app: Any, queue: str) -> int:
    # On a connection of its own: those that Celery keeps may be broken since, and sending repairs them.
    with app.connection_for_write() as connection, connection.channel() as channel:
        return int(channel.queue_declare(queue).message_count)
