"""The real child trains a tiny random model: what lands on disk, and that a paused run goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.tiny_llama import make_model
from tests.fakes.worker_rig import Rig, is_alive, rig, wait_until

from sage.tools.finetune.callbacks import CheckpointInfo
from sage_contracts.config import LoRAConfig, Task, TrainingConfig
from sage_contracts.home import Home
from sage_contracts.workers import Order, Outcome, TrainClaim
from sage_servicekit.children import Child
from sage_trainer.child import last_words
from sage_trainer.messages import (
    CHILD_MESSAGE,
    CheckpointMessage,
    ChildOrder,
    ChildSpec,
    DoneMessage,
    ReadyMessage,
    StepMessage,
)
from sage_trainer.telling import Telling

TRAINING_S = 120.0
REAL_CHILD = f'["{sys.executable}", "-m", "sage_trainer.child"]'


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "tiny", context=256)


@pytest.fixture
def real(tmp_path: Path, base_model: Path) -> Iterator[Rig]:
    with rig("folders", tmp_path) as made:
        (made.home / "base_models").mkdir()
        (made.home / "base_models/tiny").symlink_to(base_model, target_is_directory=True)
        (made.home / "files").mkdir()
        rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}."} for n in range(40)]
        (made.home / "files/file-1").write_text("\n".join(json.dumps(row) for row in rows))
        made.env["SAGE_TRAIN_CHILD_COMMAND"] = REAL_CHILD
        made.env["SAGE_TRAIN_THREADS"] = "1"
        yield made


def config(max_steps: int, task: Task = Task.CUSTOM, **fields: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model_name": "base_models/tiny",
            "task": task,
            "max_steps": max_steps,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "max_length": 128,
            "save_steps": 1000,
            "logging_steps": 10,
            "lora": LoRAConfig(r=4, lora_alpha=8),
            "report_to": [],
            **fields,
        }
    )


def waiting_children(worker_pid: int) -> list[int]:
    """The worker's children that were started ahead of their job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == worker_pid and b"--wait" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def test_a_real_run_is_paused_resumed_and_versioned(real: Rig) -> None:
    job = real.records.add_job(
        "job-1", "sums", config=config(300), training_path="files/file-1", training_filename="my sums.jsonl"
    )
    worker = real.start_worker()
    real.ring("job-1")
    real.records.wait_for(lambda: job.metrics and (job.metrics.step or 0) >= 3, TRAINING_S)
    assert waiting_children(worker.pid) == [], "none is kept before the first job ends"

    job.order = Order.PAUSE
    real.records.wait_for(lambda: job.finishes, TRAINING_S)
    assert job.finishes[0].outcome is Outcome.PAUSED
    saved = job.checkpoints[-1]
    assert 3 <= saved < 300

    wait_until(lambda: waiting_children(worker.pid) != [], "a child is kept for the next attempt")
    (spare,) = waiting_children(worker.pid)
    real.records.requeue("job-1")
    real.ring("job-1")
    real.records.wait_for(lambda: len(job.finishes) == 2, TRAINING_S)
    wait_until(lambda: not is_alive(spare), "it was that child that trained")
    finish = job.finishes[1]
    assert finish.outcome is Outcome.SUCCEEDED, finish
    assert f"Resuming after step {saved}" in job.messages
    assert finish.metrics.step == finish.metrics.total_steps == 300
    steps = [text for text in job.messages if text.startswith("Step ")]
    assert [text.split("/")[0] for text in steps] == [f"Step {number}" for number in range(10, 301, 10)]
    assert finish.metrics.eval_loss < finish.metrics.base_eval_loss
    assert finish.base_model == "base_models/tiny"
    assert finish.adapter_path == "finetune_output/sums/versions/1/lora_weights"
    assert finish.meta["data_sha256"]
    assert finish.meta["data"].startswith("my sums.jsonl: ")
    output = real.home / "finetune_output/sums"
    for folder in (output, output / "versions/1"):
        assert (folder / "lora_weights/adapter_model.safetensors").is_file()
        assert (folder / "lora_weights/tokenizer.json").is_file()
        assert json.loads((folder / "finetune_meta.json").read_text())["task"] == "custom"
    assert "Preparing data" in (output / "logs/train.log").read_text()

    # The next version starts afresh, though the folder has checkpoints, and leaves the first one as it was.
    first = (output / "versions/1/lora_weights/adapter_model.safetensors").read_bytes()
    again = real.records.add_job("job-2", "sums", version=2, config=config(2), training_path="files/file-1")
    real.ring("job-2")
    real.records.wait_for(lambda: again.finishes, TRAINING_S)
    assert again.finishes[0].outcome is Outcome.SUCCEEDED
    assert not [text for text in again.messages if "Resuming" in text]
    assert (output / "versions/1/lora_weights/adapter_model.safetensors").read_bytes() == first
    assert (output / "versions/2/lora_weights/adapter_model.safetensors").read_bytes() != first


def test_a_folder_that_is_moved_away_under_its_run_costs_it_nothing(real: Rig) -> None:
    output = real.home / "finetune_output/sums"
    job = real.records.add_job(
        "job-1", "sums", config=config(300, save_steps=100), training_path="files/file-1"
    )
    real.start_worker()
    real.ring("job-1")
    real.records.wait_for(lambda: job.checkpoints == [100], TRAINING_S)
    output.rename(real.home / "tidied away")
    real.records.wait_for(lambda: 200 in job.checkpoints, TRAINING_S)
    job.order = Order.PAUSE
    real.records.wait_for(lambda: job.finishes, TRAINING_S)
    assert job.finishes[0].outcome is Outcome.PAUSED
    saved = job.checkpoints[-1]

    real.records.requeue("job-1")
    real.ring("job-1")
    real.records.wait_for(lambda: len(job.finishes) == 2, TRAINING_S)
    assert job.finishes[1].outcome is Outcome.SUCCEEDED
    assert f"Resuming after step {saved}" in job.messages


class DiesAfter(Telling):
    """The process ends at a checkpoint, and all that it had said is lost with its worker."""

    def __init__(self, home: Home, step: int) -> None:
        super().__init__(io.StringIO(), home, "cpu")
        self._step = step

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        if checkpoint.step == self._step:
            raise KeyboardInterrupt


def test_a_run_that_died_at_its_last_step_tells_again_what_nobody_heard(real: Rig) -> None:
    claim = TrainClaim(
        job_id="job-1", attempt=1, lease_s=60, name="sums", version=1,
        config=config(6, save_steps=2, logging_steps=1),
        told_step=4, training_path="files/file-1", output_dir="finetune_output/sums",
    )  # fmt: skip
    spec = ChildSpec(home=str(real.home), device="cpu", claim=claim)
    with pytest.raises(KeyboardInterrupt):
        last_words(spec, DiesAfter(Home(real.home), 6))

    heard = io.StringIO()
    done = last_words(spec, Telling(heard, Home(real.home), "cpu"))

    assert isinstance(done, DoneMessage), done
    metrics = done.metrics
    assert (metrics.step, metrics.total_steps, metrics.epoch) == (6, 6, 0.6667)
    assert metrics.loss
    said = [CHILD_MESSAGE.validate_json(line) for line in heard.getvalue().splitlines()]
    steps = [message for message in said if isinstance(message, StepMessage)]
    assert [message.step for message in steps] == [5, 6], "the orchestrator has heard of those before"
    assert all(step.is_repeated and step.loss and step.learning_rate for step in steps)
    assert steps[-1].loss == metrics.loss
    told = [message for message in said if isinstance(message, CheckpointMessage)]
    assert [(message.step, message.path) for message in told] == [
        (step, f"finetune_output/sums/checkpoints/checkpoint-{step}") for step in (2, 4, 6)
    ]
    assert all(message.is_repeated and message.train_loss for message in told)


def test_a_model_tuned_in_full_is_versioned_as_its_own_base(real: Rig) -> None:
    whole = config(3, tuning="full", eval_steps=2, sample_prompts=["What is 1 + 1?"])
    job = real.records.add_job("job-1", "whole", config=whole, training_path="files/file-1")
    real.start_worker()
    real.ring("job-1")
    real.records.wait_for(lambda: job.finishes, TRAINING_S)
    finish = job.finishes[0]
    assert finish.outcome is Outcome.SUCCEEDED, finish
    assert (finish.base_model, finish.adapter_path) == ("finetune_output/whole/versions/1/full_model", None)
    folder = real.home / finish.base_model
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    metrics = finish.metrics
    assert metrics.perplexity < metrics.base_perplexity
    assert 0 <= metrics.base_token_accuracy <= metrics.token_accuracy <= 1
    # What was measured and answered on the way is in the job's history.
    assert [text for text in job.messages if text.startswith("Held-out loss at step 2: ")]
    assert [text for text in job.messages if "asked 'What is 1 + 1?', it answers: " in text]


def test_a_code_tree_comes_as_an_archive_and_a_missing_model_is_named(real: Rig) -> None:
    function = (
        'def add_{n}(x):\n    """Return x plus {n}."""\n    result = x + {n}\n    return result + 0 * {n}\n'
    )
    with zipfile.ZipFile(real.home / "files/tree", "w") as archive:
        for n in range(12):
            archive.writestr(f"project/part_{n}.py", function.format(n=n))
    code = real.records.add_job(
        "job-1", "adders", config=config(2, Task.CODE), training_path="files/tree",
        training_filename="my-project.tar.gz",
    )  # fmt: skip
    lost = real.records.add_job("job-2", "lost", config=config(2, Task.QA, model_name="./no/such/model"))
    real.start_worker()
    real.ring("job-1")
    real.ring("job-2")

    real.records.wait_for(lambda: code.finishes and lost.finishes, TRAINING_S)

    assert code.finishes[0].outcome is Outcome.SUCCEEDED, code.finishes[0].error_message
    assert code.finishes[0].meta["data"].startswith("functions of my-project")
    assert not (real.home / "finetune_output/adders/.source").exists()
    assert lost.finishes[0].error_code == "model_not_found"
    assert "no/such/model" in lost.finishes[0].error_message


def test_a_child_that_waits_trains_the_job_it_is_told_in_that_jobs_log(real: Rig, tmp_path: Path) -> None:
    claim = TrainClaim(
        job_id="job-1", attempt=1, lease_s=60, name="sums", version=1, config=config(2),
        training_path="files/file-1", output_dir="finetune_output/sums",
    )  # fmt: skip
    spec, log = tmp_path / "spec.json", real.home / "finetune_output/sums/logs/train.log"
    spec.write_text(ChildSpec(home=str(real.home), device="cpu", claim=claim).model_dump_json())
    command = [*json.loads(REAL_CHILD), "--wait", claim.config.model_name]
    with Child(command, log_path=tmp_path / "spare.log", env={**os.environ, **real.env}) as child:
        assert [CHILD_MESSAGE.validate_json(line) for line in child.receive(TRAINING_S)] == [ReadyMessage()]
        oom_score = Path(f"/proc/{child.pid}/oom_score_adj")
        assert oom_score.read_text() == Path("/proc/self/oom_score_adj").read_text(), (
            "it holds no job's memory"
        )
        child.order(ChildOrder(spec=spec, log=log).model_dump_json().encode())
        said = [CHILD_MESSAGE.validate_json(line).kind for line in child.receive(TRAINING_S)]
        # When memory runs out the kernel is to take what trains, and not who knows what to do then.
        assert oom_score.read_text() == "500\n"
        while not child.has_ended():
            said += [CHILD_MESSAGE.validate_json(line).kind for line in child.receive(TRAINING_S)]
        assert child.reap() == 0
        said += [CHILD_MESSAGE.validate_json(line).kind for line in child.receive(0)]
    assert said.count("step") == 2
    assert said[-1] == "done"
    assert "Preparing data" in log.read_text()
    assert (tmp_path / "spare.log").read_text() == ""
