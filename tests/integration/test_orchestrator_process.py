"""The orchestrator as a process: the official SDK, restarts, and workers that race."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.fakes.orchestrator_machine import run_job_machine
from tests.fakes.orchestrator_process import OrchestratorProcess, free_port, running_orchestrator
from tests.fakes.orchestrator_rig import GIB, rows


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrchestratorProcess]:
    with running_orchestrator(tmp_path_factory.mktemp("sdk")) as started:
        yield started


@pytest.fixture
def sdk(server: OrchestratorProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def tell(server: OrchestratorProcess, path: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=30)
    response.raise_for_status()
    return response.json()


def claim(server: OrchestratorProcess, job_id: str) -> Any:
    body = {"worker_id": "w1", "device": "cpu", "device_total_bytes": 8 * GIB}
    return tell(server, f"/internal/jobs/{job_id}/claim", **body)


def finish(server: OrchestratorProcess, job_id: str, outcome: str = "succeeded") -> None:
    adapter = {"base_model": "base", "adapter_path": "adapter"}
    tell(server, f"/internal/jobs/{job_id}/finish", worker_id="w1", attempt=1, outcome=outcome, **adapter)


def test_the_sdks_files(sdk: openai.OpenAI) -> None:
    uploaded = sdk.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    assert (uploaded.bytes, uploaded.filename, uploaded.purpose) == (len(rows()), "rows.jsonl", "fine-tune")
    assert sdk.files.retrieve(uploaded.id) == uploaded
    assert sdk.files.content(uploaded.id).read() == rows()
    for _ in range(4):
        sdk.files.create(file=("more.jsonl", rows()), purpose="fine-tune")
    assert len(list(sdk.files.list(limit=2))) >= 5
    assert sdk.files.delete(uploaded.id).deleted is True
    with pytest.raises(openai.NotFoundError, match=uploaded.id):
        sdk.files.retrieve(uploaded.id)


def test_the_sdks_fine_tuning_from_file_to_model(sdk: openai.OpenAI, server: OrchestratorProcess) -> None:
    uploaded = sdk.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model="smollm2-135m",
        training_file=uploaded.id,
        suffix="sdk",
        hyperparameters={"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 5},
        metadata={"team": "sdk"},
        seed=7,
    )
    assert (job.status, job.hyperparameters.n_epochs, job.seed) == ("queued", 2, 7)
    claim(server, job.id)
    step = {"created_at": 1.0, "message": "Step 1/2 loss 2.1", "type": "metrics", "data": {"step": 1}}
    saved = {"step": 1, "path": "checkpoints/1", "train_loss": 2.1}
    tell(
        server,
        f"/internal/jobs/{job.id}/events",
        worker_id="w1",
        attempt=1,
        events=[step],
        checkpoints=[saved],
        metrics={"eta_s": 60},
    )
    running = sdk.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.estimated_finish is not None
    finish(server, job.id)
    done = sdk.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "sdk@1", None)
    # One event to a page: the SDK follows `after` by itself.
    messages = [event.message for event in sdk.fine_tuning.jobs.list_events(job.id, limit=1)]
    assert messages[0] == "New fine-tuned model created: sdk@1"
    assert "Step 1/2 loss 2.1" in messages and messages[-1].startswith("Created fine-tuning job")
    (checkpoint,) = sdk.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.step_number, checkpoint.metrics.train_loss) == (1, 2.1)
    assert [found.id for found in sdk.fine_tuning.jobs.list(metadata={"team": "sdk"})] == [job.id]
    assert {"sdk", "sdk@1"} <= {model.id for model in sdk.models.list()}
    assert sdk.models.retrieve("sdk@1").owned_by == "sage"
    assert sdk.models.delete("sdk@1").deleted is True


def test_the_sdks_cancel_pause_and_resume(sdk: openai.OpenAI, server: OrchestratorProcess) -> None:
    uploaded = sdk.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=uploaded.id)
    assert sdk.fine_tuning.jobs.pause(job.id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job.id).status == "queued"
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_the_sdks_errors(sdk: openai.OpenAI) -> None:
    bad = sdk.files.create(file=("rows.jsonl", b'{"question": "and?"}'), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match=r"row 1.*answer") as caught:
        sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=bad.id)
    assert caught.value.code == "invalid_training_file"
    with pytest.raises(openai.NotFoundError):
        sdk.fine_tuning.jobs.retrieve("ftjob-no")


def test_of_many_workers_one_gets_the_job(sdk: openai.OpenAI, server: OrchestratorProcess) -> None:
    uploaded = sdk.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="smollm2-135m", training_file=uploaded.id)
    statuses: list[int] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        body = {"worker_id": f"w{number}", "device": f"cuda:{number}", "device_total_bytes": GIB}
        together.wait(10)
        statuses.append(
            httpx.post(f"{server.url}/internal/jobs/{job.id}/claim", json=body, timeout=30).status_code
        )

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == [200] + [409] * 7


def test_state_survives_kill_9(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, lease_s=0.5, sweep_interval_s=0.05) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        uploaded = client.files.create(file=("rows.jsonl", rows()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="smollm2-135m", training_file=uploaded.id)
        claim(server, job.id)
        client.close()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    with running_orchestrator(tmp_path, lease_s=0.5, sweep_interval_s=0.05) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused")
        # The worker was lost with it, and the next start notices.
        events = threading.Event()
        for _ in range(200):
            if client.fine_tuning.jobs.retrieve(job.id).status == "queued":
                break
            events.wait(0.05)
        assert claim(server, job.id)["attempt"] == 2
        assert client.files.content(uploaded.id).read() == rows()
        client.close()


def test_two_processes_start_on_one_new_home(tmp_path: Path) -> None:
    script = (
        "from sage_orchestrator.database import Database; import sys; "
        "database = Database(sys.argv[1]); database.upgrade(); database.close()"
    )
    command = [sys.executable, "-c", script, f"sqlite:///{tmp_path / 'state' / 'sage.db'}"]
    starters = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for starter in starters:
        _, said = starter.communicate(timeout=60)
        assert (starter.returncode, said) == (0, b"")


def test_a_database_that_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nothing"
    with (
        pytest.raises(RuntimeError, match="The database does not answer"),
        running_orchestrator(tmp_path, database_url=url),
    ):
        pass
    assert "Traceback" not in (tmp_path / "orchestrator.log").read_text()


def test_a_long_walk_through_the_state_machine(tmp_path: Path) -> None:
    from sage_orchestrator.database import Database

    url = f"sqlite:///{tmp_path / 'sage.db'}"
    database = Database(url)
    database.upgrade()
    database.close()
    run_job_machine(url, examples=20)


def test_a_second_one_on_the_same_home_is_refused_and_a_killed_one_is_followed(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as first:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}
        second = subprocess.run(
            [sys.executable, "-m", "sage_orchestrator"],
            env=environment | {"SAGE_HOME": str(tmp_path), "SAGE_ORCHESTRATOR_PORT": str(free_port())},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert "Another orchestrator" in second.stdout + second.stderr
        assert "Traceback" not in second.stdout + second.stderr
        assert httpx.get(f"{first.url}/v1/fine_tuning/jobs").status_code == 200
        first.process.kill()
        first.process.wait(10)
        with running_orchestrator(tmp_path) as third:
            assert httpx.get(f"{third.url}/v1/fine_tuning/jobs").status_code == 200
