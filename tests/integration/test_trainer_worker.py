"""The trainer as a process: real broker, real Celery worker, a child that speaks the protocol."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from tests.fakes.worker_rig import Rig, is_alive, rig, wait_until

from sage_contracts.workers import Order, Outcome
from sage_servicekit.children import MAX_LOG_BYTES

BROKERS = [pytest.param("redis", marks=pytest.mark.redis), "folders"]


@pytest.fixture(params=BROKERS)
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    with rig(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Rig]:
    """For what does not depend on the broker."""
    with rig("folders", tmp_path) as made:
        yield made


def test_a_job_is_trained_from_doorbell_to_finish(stack: Rig) -> None:
    job = stack.records.add_job("job-1", "quick")
    stack.start_worker(SAGE_TRAIN_THREADS="1")
    stack.ring("job-1")

    (finish,) = stack.records.wait_for(lambda: job.finishes)

    assert finish.outcome is Outcome.SUCCEEDED
    assert finish.adapter_path == "finetune_output/quick/versions/1/lora_weights"
    assert finish.base_model == "base_models/fake"
    assert (finish.metrics.base_eval_loss, finish.metrics.eval_loss) == (2.0, 1.0)
    assert job.messages[0] == "Preparing data"
    assert "Step 3/3 loss 0.3333" in job.messages
    assert "threads 1" in job.messages
    assert job.metrics.step == 3
    assert any(beat.kind == "trainer" for beat in stack.records.beats)
    assert (stack.home / "run" / "trainer.alive").exists()


def test_of_two_workers_one_runs_a_job_that_is_rung_twice(stack: Rig) -> None:
    job = stack.records.add_job("job-1", "steady")
    stack.start_worker()
    stack.start_worker()
    stack.ring("job-1")
    stack.records.wait_for(lambda: job.reports)

    stack.ring("job-1")
    stack.records.wait_for(lambda: job.refused_claims == 1)
    (stack.home / "finetune_output/steady/go").touch()

    (finish,) = stack.records.wait_for(lambda: job.finishes)
    assert finish.outcome is Outcome.SUCCEEDED
    assert job.claims == 1


def test_a_cancelled_job_stops_its_child(stack: Rig) -> None:
    job = stack.records.add_job("job-1", "steady")
    stack.start_worker()
    stack.ring("job-1")
    pid = stack.child_pid("steady")
    stack.records.wait_for(lambda: job.reports)

    job.order = Order.CANCEL

    (finish,) = stack.records.wait_for(lambda: job.finishes)
    assert finish.outcome is Outcome.CANCELLED
    assert not is_alive(pid)


@pytest.mark.parametrize(("name", "order"), [("crash", None), ("steady", Order.CANCEL)])
def test_a_job_that_cannot_be_resumed_gives_up_its_checkpoints(
    folders: Rig, name: str, order: Order | None
) -> None:
    """Kept for nobody, they would take the place of a paused job's."""
    checkpoints = folders.home / "finetune_output" / name / "checkpoints"
    (checkpoints / "checkpoint-5").mkdir(parents=True)
    (checkpoints / "job_id").write_text("job-1")
    job = folders.records.add_job("job-1", name)
    folders.start_worker()
    folders.ring("job-1")
    if order:
        folders.records.wait_for(lambda: job.reports)
        job.order = order

    folders.records.wait_for(lambda: job.finishes)
    wait_until(lambda: not (checkpoints / "job_id").exists(), "they are nobody's", timeout_s=5)
    assert (checkpoints / "checkpoint-5").exists(), "to be looked at"


def test_a_run_without_a_result_leaves_the_model_at_the_top_of_its_folder(folders: Rig) -> None:
    output = folders.home / "finetune_output/crash"
    for name in ("lora_weights/weights", "training_config.json", "finetune_meta.json", "result.json"):
        for folder, text in ((output, "what the run wrote"), (output / "versions/1", "version 1")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    job = folders.records.add_job("job-1", "crash", version=2, named_version=1)
    folders.start_worker()
    folders.ring("job-1")

    (finish,) = folders.records.wait_for(lambda: job.finishes)
    assert finish.outcome is Outcome.FAILED
    for name in ("lora_weights/weights", "training_config.json", "finetune_meta.json"):
        assert (output / name).read_text() == "version 1"


@pytest.mark.parametrize(("name", "told"), [("crash", "exit code 3"), ("bus", "signal SIGBUS")])
def test_a_job_that_dies_with_a_checkpoint_is_paused_and_keeps_it(folders: Rig, name: str, told: str) -> None:
    checkpoints = folders.home / "finetune_output" / name / "checkpoints"
    (checkpoints / "checkpoint-5").mkdir(parents=True)
    (checkpoints / "checkpoint-5/manifest.json").write_text("{}")
    (checkpoints / "job_id").write_text("job-1")
    job, other = folders.records.add_job("job-1", name), folders.records.add_job("job-2", "quick")
    folders.start_worker()
    folders.ring("job-1")
    folders.ring("job-2")

    folders.records.wait_for(lambda: other.finishes)
    (finish,) = job.finishes
    assert finish.outcome is Outcome.SUSPENDED
    assert told in (finish.error_message or "")
    assert "`sage finetune resume`" in (finish.error_message or "")
    assert any("Starting it again" in text for text in job.messages) == (name == "bus")
    assert (checkpoints / "job_id").read_text() == "job-1"


def test_a_paused_job_resumes_from_its_checkpoint_and_the_worker_takes_the_next_one(stack: Rig) -> None:
    owner = stack.home / "finetune_output/steady/checkpoints/job_id"
    owner.parent.mkdir(parents=True)
    owner.write_text("job-1")
    job = stack.records.add_job("job-1", "steady")
    stack.start_worker()
    stack.ring("job-1")
    stack.records.wait_for(lambda: job.metrics and job.metrics.step)

    job.order = Order.PAUSE
    stack.records.wait_for(lambda: job.finishes)
    assert job.finishes[0].outcome is Outcome.PAUSED
    (saved,) = job.checkpoints

    other = stack.records.add_job("job-2", "quick")
    stack.ring("job-2")
    stack.records.wait_for(lambda: other.finishes)
    assert owner.read_text() == "job-1", "its checkpoints are still its own"

    stack.records.requeue("job-1")
    stack.ring("job-1")
    stack.records.wait_for(lambda: f"Resumed from step {saved}" in job.messages)
    (stack.home / "finetune_output/steady/go").touch()
    stack.records.wait_for(lambda: len(job.finishes) == 2)
    assert job.finishes[1].outcome is Outcome.SUCCEEDED


def test_a_worker_that_is_told_to_stop_releases_its_job(stack: Rig) -> None:
    job = stack.records.add_job("job-1", "steady")
    worker = stack.start_worker()
    stack.ring("job-1")
    pid = stack.child_pid("steady")
    stack.records.wait_for(lambda: job.reports)

    worker.send_signal(signal.SIGTERM)

    assert worker.wait(timeout=20) == 0
    assert [finish.outcome for finish in job.finishes] == [Outcome.RELEASED]
    assert job.checkpoints
    assert not is_alive(pid)
    assert not (stack.home / "run" / "trainer.alive").exists()


def test_a_child_dies_with_a_killed_worker(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "stubborn")
    worker = folders.start_worker()
    folders.ring("job-1")
    pid = folders.child_pid("stubborn")
    folders.records.wait_for(lambda: job.reports)

    worker.kill()

    wait_until(lambda: not is_alive(pid), "the child of the killed worker is gone", timeout_s=5)
    assert not job.finishes


def test_a_stale_attempt_is_killed_at_once_and_says_nothing(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "stubborn")
    folders.start_worker()
    folders.ring("job-1")
    pid = folders.child_pid("stubborn")
    folders.records.wait_for(lambda: job.reports)

    folders.records.requeue("job-1")

    wait_until(lambda: not is_alive(pid), "the stale child is killed", timeout_s=10)
    other = folders.records.add_job("job-2", "quick")
    folders.ring("job-2")
    folders.records.wait_for(lambda: other.finishes)
    assert not job.finishes


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "stubborn")
    folders.start_worker(SAGE_STOP_GRACE_S="0.5")
    folders.ring("job-1")
    pid = folders.child_pid("stubborn")
    folders.records.wait_for(lambda: job.metrics and job.metrics.step)

    job.order = Order.CANCEL

    (finish,) = folders.records.wait_for(lambda: job.finishes)
    assert finish.outcome is Outcome.CANCELLED
    assert "The training process did not stop within 0 s and was killed" in job.messages
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("crash", "training_failed", ["exit code 3", "the fake crashed on purpose", "logs/train.log"]),
        ("refuse", "invalid_training_file", ["Row 7 has no answer"]),
        ("oom", "out_of_memory", ["signal SIGKILL", "in vain: halve_batch", "about to allocate"]),
    ],
)
def test_how_a_child_failed_is_told(folders: Rig, name: str, code: str, words: list[str]) -> None:
    job = folders.records.add_job("job-1", name)
    folders.start_worker()
    folders.ring("job-1")

    (finish,) = folders.records.wait_for(lambda: job.finishes)

    assert finish.outcome is Outcome.FAILED
    assert finish.error_code == code
    for part in words:
        assert part in finish.error_message


def test_a_failure_is_told_in_its_own_words_after_a_large_log_was_set_aside(folders: Rig) -> None:
    log = folders.home / "finetune_output/crash/logs/train.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"before\n" * (MAX_LOG_BYTES // 7 + 1))
    job = folders.records.add_job("job-1", "crash")
    folders.start_worker()
    folders.ring("job-1")

    (finish,) = folders.records.wait_for(lambda: job.finishes)

    assert "the fake crashed on purpose" in finish.error_message
    assert log.with_name("train.log.1").stat().st_size > MAX_LOG_BYTES > log.stat().st_size


def test_a_child_that_is_killed_for_its_memory_gets_a_smaller_successor(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "hungry")
    folders.start_worker()
    folders.ring("job-1")

    (finish,) = folders.records.wait_for(lambda: job.finishes)

    assert finish.outcome is Outcome.SUCCEEDED, finish.error_message
    assert job.claims == 1
    assert "Resumed from step 4" in job.messages
    assert "Rungs: halve_batch, gradient_checkpointing" in job.messages
    told = [text for text in job.messages if "Going on from its last checkpoint with" in text]
    assert [text.split(" with ")[1].split(":")[0] for text in told] == [
        "halve_batch", "gradient_checkpointing",
    ]  # fmt: skip
    assert "signal SIGKILL" in told[0]


def test_noise_and_stray_processes_of_a_child_do_no_harm(folders: Rig) -> None:
    noisy = folders.records.add_job("job-1", "noisy")
    family = folders.records.add_job("job-2", "family")
    folders.start_worker()
    folders.ring("job-1")
    folders.ring("job-2")

    folders.records.wait_for(lambda: noisy.finishes and family.finishes)

    assert noisy.finishes[0].outcome is family.finishes[0].outcome is Outcome.SUCCEEDED
    orphan = int((folders.home / "finetune_output/family/orphan.pid").read_text())
    wait_until(lambda: not is_alive(orphan), "what the child left behind is gone", timeout_s=5)


def test_training_outlives_a_restart_of_the_orchestrator(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "steady")
    folders.start_worker()
    folders.ring("job-1")
    pid = folders.child_pid("steady")
    folders.records.wait_for(lambda: job.metrics and job.metrics.step)

    folders.server.stop()
    heard = len(job.messages)
    (folders.home / "finetune_output/steady/go").touch()
    wait_until(lambda: not is_alive(pid), "the child finishes while nobody listens")
    folders.server.start()

    (finish,) = folders.records.wait_for(lambda: job.finishes)
    assert finish.outcome is Outcome.SUCCEEDED
    steps = [int(text.split()[1].split("/")[0]) for text in job.messages if text.startswith("Step ")]
    assert len(job.messages) > heard
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.redis
def test_a_job_and_the_worker_outlive_a_restart_of_redis(tmp_path: Path) -> None:
    with rig("redis", tmp_path) as stack:
        assert stack.redis is not None
        job = stack.records.add_job("job-1", "steady")
        stack.start_worker()
        stack.ring("job-1")
        stack.records.wait_for(lambda: job.metrics and job.metrics.step)

        stack.redis.stop()
        seen = len(job.reports)
        stack.records.wait_for(lambda: len(job.reports) > seen + 3)
        stack.redis.start()
        (stack.home / "finetune_output/steady/go").touch()
        stack.records.wait_for(lambda: job.finishes)
        other = stack.records.add_job("job-2", "quick")
        stack.ring("job-2")

        stack.records.wait_for(lambda: other.finishes)
        assert job.finishes[0].outcome is other.finishes[0].outcome is Outcome.SUCCEEDED
        assert job.claims == 1


@pytest.mark.redis
def test_a_worker_starts_and_works_behind_more_bells_than_redis_has_room_for(tmp_path: Path) -> None:
    with rig("redis", tmp_path) as stack:
        assert stack.redis is not None
        job = stack.records.add_job("job-1", "quick")
        stack.ring("job-1")
        with Redis(port=stack.redis.port) as redis:
            redis.config_set("maxmemory", redis.info("memory")["used_memory"] + 300 * 1024)
        for _ in range(500):
            stack.ring("job-1")

        stack.start_worker()
        stack.records.wait_for(lambda: job.finishes)
        assert job.finishes[0].outcome is Outcome.SUCCEEDED


def test_a_busy_device_is_asked_for_again(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "quick")
    job.busy_claims = 2
    folders.start_worker()
    folders.ring("job-1")
    folders.records.wait_for(lambda: job.finishes)
    assert job.finishes[0].outcome is Outcome.SUCCEEDED
    assert job.busy_claims == 0


def test_a_device_that_stays_busy_leaves_the_job_in_the_queue(folders: Rig) -> None:
    job = folders.records.add_job("job-1", "quick")
    job.busy_claims = 1000
    other = folders.records.add_job("job-2", "quick-too")
    folders.start_worker(SAGE_CLAIM_PATIENCE_S="0")
    folders.ring("job-1")
    folders.ring("job-2")
    folders.records.wait_for(lambda: other.finishes)
    assert job.status == "queued"
    assert job.busy_claims == 999
