"""The agent as a process of its own: what it leaves behind when it ends, nicely or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.fakes import model_registry
from tests.fakes.asgi_server import serving, unused_url
from tests.fakes.inference_rig import fake_command, make_registry, question

from sage_inference import process_group


def wait_for(what: Callable[[], Any], timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return found


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).is_success
    except httpx.TransportError:
        return False


@contextmanager
def agent(home: Path, *misbehaviour: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with serving(model_registry.build_app(make_registry(home), home)) as registry_url:
        url = unused_url()
        env = {
            **os.environ,
            "SAGE_HOME": str(home),
            "SAGE_ORCHESTRATOR_URL": registry_url,
            "SAGE_CHAT_FINETUNE_PORT": url.rpartition(":")[2],
            "SAGE_ENGINE": "vllm",
            "SAGE_DEVICE": "cpu",
            "SAGE_VLLM_COMMAND": fake_command(*misbehaviour),
            "SAGE_ENGINE_STOP_GRACE_S": "0.5",
        }
        process = subprocess.Popen([sys.executable, "-m", "sage_inference"], env=env, start_new_session=True)
        try:
            wait_for(lambda: is_up(url))
            yield process, url
        finally:
            process.kill()
            process.wait()


def start_engine(url: str) -> int:
    """The process group of a freshly started engine."""
    response = httpx.post(f"{url}/v1/chat/completions", json=question("code"), timeout=60)
    assert response.status_code == 200, response.text
    return int(httpx.get(f"{url}/v1/sage/engines").json()["engines"][0]["pid"])


def test_sigterm_ends_the_agent_and_everything_it_started(tmp_path: Path) -> None:
    with agent(tmp_path, "--ignore-sigterm", "--grandchild") as (process, url):
        group = start_engine(url)
        assert len(process_group.alive(group)) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0 or process.returncode == -signal.SIGTERM
        assert process_group.alive(group) == []


def test_an_engine_does_not_outlive_an_agent_that_was_killed(tmp_path: Path) -> None:
    with agent(tmp_path) as (process, url):
        group = start_engine(url)
        process.kill()
        process.wait()
        wait_for(lambda: not process_group.alive(group))


def test_what_a_killed_agent_left_is_ended_by_the_next_one(tmp_path: Path) -> None:
    with agent(tmp_path, "--ignore-sigterm", "--grandchild") as (process, url):
        group = start_engine(url)
        process.kill()
        process.wait()
        assert process_group.alive(group)
    with agent(tmp_path):
        assert process_group.alive(group) == []
