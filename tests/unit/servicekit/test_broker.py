"""The doorbells: how they are configured, and that the folder transport loses and doubles nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from sage_contracts.workers import MERGE_TASK, TRAIN_TASK
from sage_servicekit.broker import make_celery, ring
from sage_servicekit.settings import ServiceSettings


def folders(home: Path) -> Any:
    return make_celery(ServiceSettings(home_dir=home, broker_url="filesystem://"))


def take(app: Any, queue: str) -> list[str]:
    """The ids that wait in a queue, in order; takes them off."""
    with app.connection_for_read() as connection:
        box = connection.SimpleQueue(queue)
        found = []
        while True:
            try:
                message = box.get(block=False)
            except box.Empty:
                return found
            found.append(message.payload[0][0])
            message.ack()


def test_redis_doorbells_are_acknowledged_early_and_not_hoarded() -> None:
    conf = make_celery(ServiceSettings(broker_url="redis://127.0.0.1:1/0")).conf
    assert conf.task_acks_late is False
    assert conf.worker_disable_prefetch is True
    assert conf.worker_prefetch_multiplier == 1
    assert conf.task_ignore_result is True


def test_each_task_goes_to_its_own_queue_in_order(tmp_path: Path) -> None:
    app = folders(tmp_path)
    for number in range(5):
        ring(app, TRAIN_TASK, f"job-{number}")
    ring(app, MERGE_TASK, "merge-0")

    assert take(app, "train") == [f"job-{number}" for number in range(5)]
    assert take(app, "merge") == ["merge-0"]
    assert take(app, "train") == []


def test_a_doorbell_that_nobody_has_answered_waits_once_and_keeps_its_turn(tmp_path: Path) -> None:
    for job_id in ("job-1", "job-2", "job-1", "job-1", "job-2", "job-3"):
        ring(folders(tmp_path), TRAIN_TASK, job_id)
    assert len(list(tmp_path.rglob("*.msg"))) == 3
    assert take(folders(tmp_path), "train") == ["job-1", "job-2", "job-3"]


def test_a_doorbell_rung_after_its_last_was_taken_is_heard(tmp_path: Path) -> None:
    app = folders(tmp_path)
    ring(app, TRAIN_TASK, "job-1")
    with app.connection_for_read() as connection:
        connection.SimpleQueue("train").get(block=False)  # taken, and not acknowledged yet
        ring(app, TRAIN_TASK, "job-1")
        assert take(app, "train") == ["job-1"]
        ring(app, TRAIN_TASK, "job-1")
    # What the first reader gives back is what waits already.
    assert take(app, "train") == ["job-1"]


def test_messages_lie_below_the_home_and_nothing_else_is_left(tmp_path: Path) -> None:
    app = folders(tmp_path)
    ring(app, TRAIN_TASK, "job-1")
    (message,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert message.parent == tmp_path / "state" / "broker" / "train"
    take(app, "train")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_message_is_seen_by_one_of_many_readers(tmp_path: Path) -> None:
    app = folders(tmp_path)
    ids = [f"job-{number}" for number in range(40)]
    for job_id in ids:
        ring(app, TRAIN_TASK, job_id)
    taken: list[str] = []
    threads = [
        threading.Thread(target=lambda: taken.extend(take(folders(tmp_path), "train"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(taken) == sorted(ids)


def test_what_is_being_written_is_not_read(tmp_path: Path) -> None:
    app = folders(tmp_path)
    ring(app, TRAIN_TASK, "job-1")
    queue = tmp_path / "state" / "broker" / "train"
    (queue / ".00000000000000000001-x.msg.tmp").write_bytes(b"")
    assert take(app, "train") == ["job-1"]


def test_an_unacknowledged_message_returns_when_the_reader_leaves(tmp_path: Path) -> None:
    app = folders(tmp_path)
    ring(app, TRAIN_TASK, "job-1")
    with app.connection_for_read() as connection:
        connection.SimpleQueue("train").get(block=False)
    assert take(app, "train") == ["job-1"]


@pytest.mark.parametrize("queue", ["../elsewhere", "/etc", "a/b"])
def test_a_queue_name_cannot_leave_the_folder(tmp_path: Path, queue: str) -> None:
    with folders(tmp_path).connection_for_write() as connection, pytest.raises(ValueError, match="plain"):
        connection.default_channel.queue_declare(queue)
