"""What the engine cannot load is merged by itself: the host with a fake vLLM, beside a real orchestrator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.inference_rig import fake_command, make_base_folder, question, said
from tests.fakes.orchestrator_rig import GIB, ListBell
from tests.fakes.worker_rig import wait_until

from sage_contracts.workers import MERGE_TASK
from sage_inference.main import build_app
from sage_inference.settings import InferenceSettings
from sage_orchestrator.main import build_app as build_orchestrator
from sage_orchestrator.settings import OrchestratorSettings

CHECKPOINT = "finetune_output/code/checkpoints/checkpoint-2"
MERGED = "finetune_output/code/versions/1/merged_model"


@dataclass
class Stack:
    """Somebody's DoRA model `code@1`, the host that serves it, and a merger in the test's hand."""

    home: Path
    bell: ListBell
    orchestrator: httpx.Client
    host: httpx.Client

    def post(self, path: str, body: Any) -> Any:
        response = self.orchestrator.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def train(self) -> None:
        job = self.post("/v1/fine_tuning/jobs", {"model": "smollm2-135m", "sage": {"task": "code"}})
        worker = {"worker_id": "w1", "device": "cpu", "device_total_bytes": 8 * GIB}
        self.post(f"/internal/jobs/{job['id']}/claim", worker)
        adapter = self.home / "finetune_output/code/versions/1/lora_weights"
        for folder in (adapter, self.home / CHECKPOINT):
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "use_dora": True}))
        (self.home / CHECKPOINT / "state.json").write_text(json.dumps({"run": {"run_id": job["id"]}}))
        checkpoint = {"step": 2, "path": CHECKPOINT, "train_loss": 1.0}
        news = {"worker_id": "w1", "attempt": 1, "checkpoints": [checkpoint]}
        self.post(f"/internal/jobs/{job['id']}/events", news)
        base = make_base_folder(self.home / "base_models/smollm2-135m")
        done = {"outcome": "succeeded", "base_model": str(base), "adapter_path": str(adapter)}
        self.post(f"/internal/jobs/{job['id']}/finish", {"worker_id": "w1", "attempt": 1, **done})

    def merges(self) -> list[str]:
        return list(dict.fromkeys(work for task, work in self.bell.rung if task == MERGE_TASK))

    def claim_merge(self) -> str:
        wait_until(lambda: bool(self.merges()), "a merge is asked for")
        (merge_id,) = self.merges()
        self.post(f"/internal/merges/{merge_id}/claim", {"worker_id": "m1"})
        progress = {"worker_id": "m1", "attempt": 1, "phase": "asking the merged model"}
        self.post(f"/internal/merges/{merge_id}/events", progress)
        return merge_id

    def end_merge(self, merge_id: str, outcome: str, **fields: Any) -> None:
        body = {"worker_id": "m1", "attempt": 1, "outcome": outcome, **fields}
        self.post(f"/internal/merges/{merge_id}/finish", body)

    def stream(self, lines: list[str]) -> None:
        """Fills `lines` as they come."""
        body = question("code", stream=True)
        with self.host.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in filter(None, response.iter_lines()):
                lines.append(line)


@contextmanager
def running(home: Path, **settings: Any) -> Iterator[Stack]:
    bell = ListBell()
    orchestrator = build_orchestrator(OrchestratorSettings(home_dir=home), doorbell=bell)
    fields: dict[str, Any] = {"engine": "vllm", "vllm_command": fake_command(), "device": "cpu"}
    fields |= {"comment_interval_s": 0.1, "beat_interval_s": 0.1, "engine_stop_grace_s": 1, **settings}
    with serving(orchestrator) as url:
        host = build_app(InferenceSettings(home_dir=home, orchestrator_url=url, **fields))
        with (
            serving(host) as host_url,
            httpx.Client(base_url=url, timeout=30) as to_orchestrator,
            httpx.Client(base_url=host_url, timeout=30) as to_host,
        ):
            stack = Stack(home, bell, to_orchestrator, to_host)
            stack.train()
            yield stack


def test_a_chat_waits_for_the_merge_that_it_needs_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path) as stack, ThreadPoolExecutor(2) as pool:
        screens: list[list[str]] = [[], []]
        chats = [pool.submit(stack.stream, lines) for lines in screens]
        merge_id = stack.claim_merge()
        because = ": merging code@1 first, because vLLM cannot load an adapter with DoRA (asking the merged"
        wait_until(lambda: all(because in "".join(lines) for lines in screens), "both see what they wait for")
        make_base_folder(tmp_path / MERGED)
        stack.end_merge(merge_id, "succeeded", merged_path=MERGED)

        for chat, lines in zip(chats, screens, strict=True):
            chat.result()
            assert lines[0].startswith(": merging code@1 first")
            assert said(lines) and lines[-1] == "data: [DONE]"
        (engine,) = stack.host.get("/v1/sage/engines").json()["engines"]
        assert (engine["base_model"], engine["adapters"]) == ("code@1", [])
        # Nothing is merged twice.
        assert stack.host.post("/v1/chat/completions", json=question("code")).json()["model"] == "code@1"
        assert stack.merges() == [merge_id]


def test_a_merge_by_hand_with_another_dtype_serves_as_well(tmp_path: Path) -> None:
    with running(tmp_path) as stack, ThreadPoolExecutor(1) as pool:
        stack.post("/v1/sage/models/code@1/merge", {"dtype": "fp16"})
        merge_id = stack.claim_merge()
        lines: list[str] = []
        chat = pool.submit(stack.stream, lines)
        waiting = ": waiting for the merge of code@1 that is under way, because vLLM cannot load"
        wait_until(lambda: waiting in "".join(lines) or chat.done(), "the chat says what it waits for")
        make_base_folder(tmp_path / MERGED)
        stack.end_merge(merge_id, "succeeded", merged_path=MERGED)
        chat.result()
        assert said(lines) and lines[-1] == "data: [DONE]"
        assert stack.merges() == [merge_id]


def test_a_checkpoint_that_would_have_to_be_merged_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as stack:
        answer = stack.host.post("/v1/chat/completions", json=question("code@1:ckpt-step-2"))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_found")
        assert "code@1:ckpt-step-2 would have to be merged, because vLLM cannot load" in error["message"]
        assert "ask for its job's result, 'code@1'" in error["message"]
        assert stack.merges() == []


def test_who_does_not_wait_is_told_to_come_again_and_the_merge_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, request_start_timeout_s=0.5) as stack:
        early = stack.host.post("/v1/chat/completions", json=question("code"))
        assert early.status_code == 503 and int(early.headers["retry-after"]) > 0
        assert early.json()["error"]["code"] == "engine_starting"
        assert early.headers["x-should-retry"] == "true"
        assert "merging code@1 first, because vLLM cannot load" in early.json()["error"]["message"]
        merge_id = stack.claim_merge()
        again = stack.host.post("/v1/chat/completions", json=question("code"))
        assert "(asking the merged model)" in again.json()["error"]["message"]
        make_base_folder(tmp_path / MERGED)
        stack.end_merge(merge_id, "succeeded", merged_path=MERGED)

        wait_until(
            lambda: stack.host.post("/v1/chat/completions", json=question("code")).status_code == 200,
            "the next try works",
        )
        assert stack.merges() == [merge_id]


@pytest.mark.parametrize("outcome", ["failed", "succeeded elsewhere"])
def test_a_merge_that_does_not_help_is_explained(tmp_path: Path, outcome: str) -> None:
    with running(tmp_path) as stack, ThreadPoolExecutor(1) as pool:
        chat = pool.submit(stack.host.post, "/v1/chat/completions", json=question("code"))
        merge_id = stack.claim_merge()
        if outcome == "failed":
            stack.end_merge(merge_id, "failed", error_message="no room on the disk")
        else:
            stack.end_merge(merge_id, "succeeded", merged_path=MERGED)

        answer = chat.result()
        error = answer.json()["error"]
        if outcome == "failed":
            assert (answer.status_code, error["code"]) == (502, "engine_failed")
            assert "code@1 has to be merged first" in error["message"]
            assert "no room on the disk" in error["message"]
            # Else OpenAI's clients would ask again by themselves.
            assert answer.headers["x-should-retry"] == "false"
        else:
            assert (answer.status_code, error["code"]) == (404, "model_not_found")
            assert MERGED in error["message"]


def test_a_failed_merge_is_not_repeated_by_each_question_and_one_by_hand_helps(tmp_path: Path) -> None:
    with running(tmp_path) as stack, ThreadPoolExecutor(1) as pool:
        chat = pool.submit(stack.host.post, "/v1/chat/completions", json=question("code"))
        failed = stack.claim_merge()
        stack.end_merge(failed, "failed", error_message="no room on the disk")
        assert chat.result().status_code == 502

        again = stack.host.post("/v1/chat/completions", json=question("code"))
        assert again.status_code == 502
        assert "no room on the disk" in again.json()["error"]["message"]
        assert "sage finetune merge code@1" in again.json()["error"]["message"]
        assert stack.merges() == [failed]

        by_hand = stack.post("/v1/sage/models/code@1/merge", {})["id"]
        stack.post(f"/internal/merges/{by_hand}/claim", {"worker_id": "m1"})
        make_base_folder(tmp_path / MERGED)
        stack.end_merge(by_hand, "succeeded", merged_path=MERGED)
        wait_until(
            lambda: stack.host.post("/v1/chat/completions", json=question("code")).status_code == 200,
            "the merge by hand is seen",
        )
