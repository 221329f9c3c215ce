"""The trainer under the real orchestrator: the public API drives it, nothing stands in but the child."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.fakes.worker_rig import FAKE_CHILD, broker, free_port, is_alive, wait_until

ROWS = '{"question": "Is it?", "answer": "It is."}\n' * 3


@dataclass
class Stack:
    home: Path
    api: httpx.Client
    env: dict[str, str]
    processes: list[subprocess.Popen[bytes]]

    def start(self, module: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{module}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", module], env=self.env, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_orchestrator(self) -> subprocess.Popen[bytes]:
        process = self.start("sage_orchestrator")
        wait_until(self._answers, "the orchestrator answers")
        return process

    def _answers(self) -> bool:
        try:
            return self.api.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def create_job(self, name: str) -> str:
        upload = {"file": ("rows.jsonl", ROWS.encode())}
        file = (
            self.api.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).raise_for_status().json()
        )
        body = {
            "model": "smollm2-135m",
            "training_file": file["id"],
            "suffix": name,
            "sage": {"task": "custom", "preset": "cpu"},
        }
        return str(self.api.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.get(f"/v1/fine_tuning/jobs/{job_id}").raise_for_status().json()
        return found

    def wait_for(
        self, job_id: str, what: Callable[[dict[str, Any]], bool], timeout_s: float = 60
    ) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not what(job := self.job(job_id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return job

    def events(self, job_id: str) -> list[str]:
        page = self.api.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()
        return [event["message"] for event in page["data"]]


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "folders"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    home = tmp_path / "home"
    home.mkdir()
    port = free_port()
    with broker(request.param, tmp_path / "redis") as (broker_url, _):
        env = {
            **os.environ,
            "SAGE_HOME": str(home),
            "SAGE_RUN_DIR": str(home / "run"),
            "SAGE_BROKER_URL": broker_url,
            "SAGE_ORCHESTRATOR_PORT": str(port),
            "SAGE_ORCHESTRATOR_URL": f"http://127.0.0.1:{port}",
            "SAGE_INTERNAL_TOKEN": "between-us",
            "SAGE_LEASE_S": "3",
            "SAGE_REPORT_INTERVAL_S": "0.2",
            "SAGE_TRAIN_DEVICE": "cpu",
            "SAGE_TRAIN_CHILD_COMMAND": f'["{sys.executable}", "{FAKE_CHILD}"]',
        }
        with httpx.Client(base_url=env["SAGE_ORCHESTRATOR_URL"], timeout=10) as api:
            made = Stack(home, api, env, [])
            made.start_orchestrator()
            try:
                yield made
            finally:
                for process in reversed(made.processes):
                    process.terminate()
                    try:
                        process.wait(timeout=40)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                for log in home.glob("*.log"):
                    print(log.read_text(errors="replace"))


def test_a_job_becomes_a_version(stack: Stack) -> None:
    stack.start("sage_trainer")
    job_id = stack.create_job("quick")

    job = stack.wait_for(job_id, lambda job: job["status"] in ("succeeded", "failed"))

    assert job["status"] == "succeeded", job
    assert job["fine_tuned_model"] == "quick@1"
    assert job["sage"]["metrics"]["eval_loss"] == 1.0
    events = stack.events(job_id)
    assert "Preparing data" in events
    assert "Step 3/3 loss 0.3333" in events
    content = stack.api.get(f"/v1/files/{job['result_files'][0]}/content").text
    assert content.splitlines()[1:] == ["0,,,2,0.25", "1,1,,,", "2,0.5,,,", "3,0.333333,,1,0.5"]


def test_a_sweep_trains_its_jobs_one_after_another_and_names_the_best(stack: Stack) -> None:
    stack.start("sage_trainer")
    body = {
        "model": "smollm2-135m",
        "sage": {"task": "code", "name": "graded", "preset": "cpu"},
        "grid": {"lora.r": [2, 1, 4]},
    }
    sweep = stack.api.post("/v1/sage/sweeps", json=body).raise_for_status().json()
    path = f"/v1/sage/sweeps/{sweep['id']}"

    wait_until(lambda: stack.api.get(path).json()["status"] != "running", "the sweep has ended", 60)

    ended = stack.api.get(path).json()
    assert ended["status"] == "succeeded", ended
    assert [child["status"] for child in ended["children"]] == ["succeeded", "failed", "succeeded"]
    assert "the fake crashed on purpose" in ended["children"][1]["error"]["message"]
    assert (ended["best_job_id"], ended["fine_tuned_model"]) == (ended["children"][2]["job_id"], "graded@1")
    # People find the files where the name says, whatever job wrote them.
    assert (stack.home / "finetune_output/graded/versions/1/lora_weights").is_dir()
    spans = [
        (event["created_at"], event["message"])
        for child in ended["children"]
        for event in stack.api.get(f"/v1/fine_tuning/jobs/{child['job_id']}/events").json()["data"][::-1]
        if event["message"].startswith("Started on")
    ]
    assert spans == sorted(spans)


def test_pause_resume_and_cancel_reach_the_child(stack: Stack) -> None:
    stack.start("sage_trainer")
    job_id = stack.create_job("steady")
    stack.wait_for(job_id, lambda job: (job["sage"]["metrics"]["step"] or 0) > 2)

    stack.api.post(f"/v1/fine_tuning/jobs/{job_id}/pause").raise_for_status()
    stack.wait_for(job_id, lambda job: job["status"] == "paused")
    pid = int((stack.home / "finetune_output/steady/child.pid").read_text())
    assert not is_alive(pid)

    stack.api.post(f"/v1/fine_tuning/jobs/{job_id}/resume").raise_for_status()
    stack.wait_for(job_id, lambda job: any("Resumed from step" in text for text in stack.events(job["id"])))
    stack.api.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
    stack.wait_for(job_id, lambda job: job["status"] == "cancelled")


def test_a_killed_trainer_and_a_restarted_orchestrator_cost_nothing_but_time(stack: Stack) -> None:
    trainer = stack.start("sage_trainer")
    job_id = stack.create_job("steady")
    stack.wait_for(job_id, lambda job: (job["sage"]["metrics"]["step"] or 0) > 2)

    orchestrator = stack.processes[0]
    orchestrator.terminate()
    orchestrator.wait(timeout=30)
    stack.start_orchestrator()
    stack.wait_for(job_id, lambda job: job["status"] == "running")

    trainer.kill()
    trainer.wait()
    stack.start("sage_trainer")
    job = stack.wait_for(job_id, lambda job: job["status"] == "running" and job["sage"]["attempt"] == 2)
    (stack.home / "finetune_output/steady/go").touch()
    job = stack.wait_for(job_id, lambda job: job["status"] == "succeeded")
    assert job["fine_tuned_model"] == "steady@1"
