"""Doorbells through the real broker, also when it is not there yet."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.fakes.orchestrator_process import OrchestratorProcess, free_port, running_orchestrator

from sage_contracts.workers import TRAIN_TASK
from sage_orchestrator.doorbell import CeleryDoorbell
from sage_orchestrator.settings import OrchestratorSettings
from sage_servicekit.broker import make_celery


def until(condition: Callable[[], Any], deadline_s: float = 30.0) -> Any:
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, "not in time"
        threading.Event().wait(0.05)
    return found


def create_job(server: OrchestratorProcess) -> str:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}}
    response = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def rung_for(settings: OrchestratorSettings, task: str, queue: str) -> list[Any] | None:
    """The arguments of the next doorbell in the queue, as a worker would get them; None when it is empty."""
    with make_celery(settings).connection_for_read() as connection, connection.channel() as channel:
        message = connection.SimpleQueue(queue, channel=channel).queue.get()
        if message is None:
            return None
        message.ack()
        assert message.headers["task"] == task
        arguments: list[Any] = message.payload[0]
        return arguments


@contextmanager
def running_redis(port: int, folder: Path) -> Iterator[None]:
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(folder), "--bind", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        server.terminate()
        server.wait(10)


def test_a_new_job_rings_in_the_folder_of_the_embedded_stack(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as server:
        job_id = create_job(server)
        settings = OrchestratorSettings(home_dir=tmp_path)
        assert until(lambda: rung_for(settings, TRAIN_TASK, "train")) == [job_id]


@pytest.mark.redis
def test_a_job_created_while_redis_is_down_is_rung_for_when_it_is_up(tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with running_orchestrator(tmp_path, broker_url=url, ring_retry_s=0.2, sweep_interval_s=0.1) as server:
        started = time.monotonic()
        job_id = create_job(server)
        # Nobody waits for the broker.
        assert time.monotonic() - started < 5
        until(lambda: "not delivered" in server.log())
        with running_redis(port, tmp_path):
            settings = OrchestratorSettings(home_dir=tmp_path, broker_url=url)
            assert until(lambda: rung_for(settings, TRAIN_TASK, "train")) == [job_id]


@pytest.mark.redis
def test_a_redis_that_is_not_there_is_told_within_seconds(tmp_path: Path) -> None:
    assert shutil.which("redis-server")
    settings = OrchestratorSettings(home_dir=tmp_path, broker_url=f"redis://127.0.0.1:{free_port()}/0")
    started = time.monotonic()
    with pytest.raises(Exception, match=r"refused|111"):
        CeleryDoorbell(settings).ring(TRAIN_TASK, "ftjob-1")
    assert time.monotonic() - started < 10
