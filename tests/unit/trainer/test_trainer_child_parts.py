"""The parts of the training child that need no model: its folders, and its words."""

from __future__ import annotations

import errno
import io
import json
import signal
import zipfile
from pathlib import Path

import pytest
from tests.fakes.small_disk import no_room_below

from sage.tools.finetune.callbacks import CheckpointInfo, Evaluation, GeneratedAnswer, StepMetrics
from sage.tools.finetune.ladder import Rung
from sage_contracts.config import TrainingConfig
from sage_contracts.home import Home
from sage_contracts.jobs import JobMetrics
from sage_contracts.workers import TrainClaim
from sage_trainer.child import last_words
from sage_trainer.folders import (
    VersionResult,
    give_up_checkpoints,
    named_as_given,
    read_result,
    remove_leftovers,
    show_version,
    take_checkpoints,
    write_version,
)
from sage_trainer.messages import (
    CHILD_MESSAGE,
    ChildSpec,
    DoneMessage,
    EvalMessage,
    FailedMessage,
    StepMessage,
)
from sage_trainer.telling import RestartNow, StopNow, Telling


def spec_of(home: Path, **fields: object) -> ChildSpec:
    claim = TrainClaim(
        job_id="job-1",
        attempt=1,
        lease_s=30,
        name="code",
        version=2,
        config=TrainingConfig(model_name="./no/such/model"),
        output_dir="finetune_output/code",
    )
    return ChildSpec(home=str(home), device="cpu", claim=claim.model_copy(update=fields))


def telling(home: Path, device: str = "cpu") -> tuple[Telling, io.StringIO]:
    out = io.StringIO()
    return Telling(out, Home(home), device), out


def said(out: io.StringIO) -> list[object]:
    return [CHILD_MESSAGE.validate_json(line) for line in out.getvalue().splitlines()]


def test_checkpoints_are_of_one_job_and_a_paused_one_finds_its_own_again(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "checkpoint-900").mkdir(parents=True)  # of nobody any more
    take_checkpoints(tmp_path, "paused")
    assert not (checkpoints / "checkpoint-900").exists()
    (checkpoints / "checkpoint-5").mkdir()
    take_checkpoints(tmp_path, "paused")
    assert (checkpoints / "checkpoint-5").exists()

    take_checkpoints(tmp_path, "other")
    assert not (checkpoints / "checkpoint-5").exists()
    (checkpoints / "checkpoint-7").mkdir()
    give_up_checkpoints(tmp_path, "somebody else")
    give_up_checkpoints(tmp_path, "other")
    assert (checkpoints / "checkpoint-7").exists()

    take_checkpoints(tmp_path, "paused")
    assert (checkpoints / "checkpoint-5").exists()
    assert not (checkpoints / "checkpoint-7").exists()
    assert not list(tmp_path.glob(".checkpoints-*"))


def test_checkpoints_of_every_paused_job_are_kept_and_those_of_cancelled_ones_go(tmp_path: Path) -> None:
    begun = [f"job-{number}" for number in range(6)]
    for job_id in begun:
        take_checkpoints(tmp_path, job_id, begun)
        (tmp_path / "checkpoints" / f"checkpoint-of-{job_id}").mkdir()
    begun.remove("job-3")  # cancelled while it was paused: no trainer was told
    take_checkpoints(tmp_path, "next", begun)
    parked = {path.name for path in tmp_path.glob(".checkpoints-*")}
    assert parked == {f".checkpoints-{job_id}" for job_id in begun}
    take_checkpoints(tmp_path, "job-0", [*begun, "next"])
    assert (tmp_path / "checkpoints" / "checkpoint-of-job-0").exists()


def test_a_resumed_job_lets_the_checkpoints_of_a_cancelled_one_go(tmp_path: Path) -> None:
    """The folder is its own already: it is not only those who take it that look for what is left."""
    take_checkpoints(tmp_path, "cancelled", [])
    take_checkpoints(tmp_path, "resumed", ["cancelled"])  # both are paused after it, and one is cancelled
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir()
    assert (tmp_path / ".checkpoints-cancelled").exists()
    take_checkpoints(tmp_path, "resumed", [])
    assert not list(tmp_path.glob(".checkpoints-*"))
    assert (tmp_path / "checkpoints" / "checkpoint-3").exists()


def test_nothing_goes_while_it_is_not_known_who_has_ended(tmp_path: Path) -> None:
    for number in range(6):
        take_checkpoints(tmp_path, f"job-{number}")
    assert len(list(tmp_path.glob(".checkpoints-*"))) == 5


def test_jobs_that_ended_take_no_place_from_a_paused_one(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for job_id in ("paused", "failed-1", "failed-2", "failed-3"):
        take_checkpoints(tmp_path, job_id)
        (checkpoints / f"checkpoint-{len(job_id)}").mkdir()
        if job_id == "failed-3":
            take_checkpoints(tmp_path, "next")  # it was faster
        if job_id.startswith("failed"):
            give_up_checkpoints(tmp_path, job_id)
    assert (checkpoints / "job_id").read_text() == "next"
    assert [path.name for path in tmp_path.glob(".checkpoints-*")] == [".checkpoints-paused"]
    take_checkpoints(tmp_path, "paused")
    assert (checkpoints / "checkpoint-6").exists()


def test_what_a_killed_attempt_had_begun_is_removed(tmp_path: Path) -> None:
    begun = [
        ".lora_weights.x1",
        ".full_model.x1",
        "checkpoints/.checkpoint-5.x1",
        "versions/.2.x1",
        ".source",
    ]
    kept = ["lora_weights", "checkpoints/checkpoint-5", "versions/1", "logs"]
    for name in begun + kept:
        (tmp_path / name).mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert not [name for name in begun if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in kept)


def finished_output(home: Path) -> Path:
    output = home / "finetune_output/code"
    (output / "lora_weights").mkdir(parents=True)
    (output / "lora_weights/adapter_model.safetensors").write_bytes(b"weights")
    for name in ("training_config.json", "finetune_meta.json"):
        (output / "lora_weights" / name).write_text("{}")
    return output


def test_data_is_read_under_the_name_that_its_owner_gave_it(tmp_path: Path) -> None:
    stored = tmp_path / "file-1.jsonl"
    stored.write_text("{}")
    link = named_as_given(stored, "我的数据 (2).jsonl", tmp_path / "named")
    assert (link.name, link.read_text()) == ("我的数据 (2).jsonl", "{}")
    assert named_as_given(stored, None, tmp_path / "unnamed") == stored


@pytest.mark.parametrize("filename", ["..", ".", "a\0b", "x" * 300, "no/such/folder"])
def test_a_name_that_cannot_be_a_files_leaves_it_as_it_is_stored(tmp_path: Path, filename: str) -> None:
    stored = tmp_path / "file-1.jsonl"
    stored.write_text("{}")
    assert named_as_given(stored, filename, tmp_path / "named") == stored


def test_a_version_is_a_copy_that_stays(tmp_path: Path) -> None:
    output = finished_output(tmp_path)
    done = DoneMessage(metrics=JobMetrics(eval_loss=1.5), base_model="b", adapter_path="a")
    write_version(output / "lora_weights", output / "versions/2", VersionResult(job_id="job-1", done=done))

    # As the engine writes: a new file takes the place of the old one.
    (output / "lora_weights/new").write_bytes(b"other")
    (output / "lora_weights/new").replace(output / "lora_weights/adapter_model.safetensors")

    assert (output / "versions/2/lora_weights/adapter_model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in (output / "versions").iterdir()) == ["2"]
    assert read_result(output / "versions/2", "job-1") == done
    assert read_result(output / "versions/2", "job-9") is None
    assert read_result(output / "versions/3", "job-1") is None


def test_an_older_run_that_ends_later_does_not_take_the_top_from_a_younger_version(tmp_path: Path) -> None:
    output = tmp_path / "code"
    for version in (2, 1):
        for name in ("adapter_model.safetensors", "training_config.json", "finetune_meta.json"):
            for folder in (output / "lora_weights", output):
                folder.mkdir(parents=True, exist_ok=True)
                (output / "new").write_text(f"{name} of {version}")
                (output / "new").replace(folder / name)
        result = VersionResult(job_id="job-1", done=DoneMessage(metrics=JobMetrics(), base_model="b"))
        write_version(output / "lora_weights", output / "versions" / str(version), result)
    (output / "versions/2/merged_model").mkdir()
    for _ in range(2):
        show_version(output, 2)
        assert (output / "lora_weights/adapter_model.safetensors").read_text().endswith("of 2")
        assert (output / "training_config.json").read_text().endswith("of 2")
        assert (output / "finetune_meta.json").read_text().endswith("of 2")
        assert (output / "merged_model").resolve() == output / "versions/2/merged_model"
    assert (output / "versions/1/lora_weights/adapter_model.safetensors").read_text().endswith("of 1")
    show_version(output, 3)  # it lies under the name of a sweep's job
    assert (output / "lora_weights/adapter_model.safetensors").read_text().endswith("of 2")
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_a_version_of_the_other_kind_takes_the_whole_top(tmp_path: Path) -> None:
    output = finished_output(tmp_path)
    result = VersionResult(job_id="job-1", done=DoneMessage(metrics=JobMetrics(), base_model="b"))
    write_version(output / "lora_weights", output / "versions/2", result)
    (output / "full_model").mkdir()
    show_version(output, 2)
    assert not (output / "full_model").exists()


def test_a_result_that_could_not_be_reported_is_not_trained_again(tmp_path: Path) -> None:
    output = finished_output(tmp_path)
    done = DoneMessage(metrics=JobMetrics(), base_model="b", adapter_path="a")
    write_version(output / "lora_weights", output / "versions/2", VersionResult(job_id="job-1", done=done))
    tell, _ = telling(tmp_path)
    assert last_words(spec_of(tmp_path, attempt=2), tell) == done


def test_an_error_of_ours_keeps_its_code(tmp_path: Path) -> None:
    tell, _ = telling(tmp_path)
    words = last_words(spec_of(tmp_path, training_path="files/none"), tell)
    assert isinstance(words, FailedMessage)
    assert words.is_explained
    assert words.code == "invalid_training_file"
    assert not words.may_pass


def test_faults_that_are_not_the_jobs_are_said_to_be_so(tmp_path: Path) -> None:
    rows = tmp_path / "files/rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"question": "What is it?", "answer": "This."}\n' * 9)
    spec = spec_of(tmp_path, training_path="files/rows.jsonl")
    away = last_words(spec, telling(tmp_path)[0])
    (tmp_path / "finetune_output/other").touch()
    other = spec_of(tmp_path, training_path="files/rows.jsonl", output_dir="finetune_output/other")
    unreadable = last_words(other, telling(tmp_path)[0])
    assert isinstance(away, FailedMessage)
    assert isinstance(unreadable, FailedMessage)
    assert (away.code, unreadable.code) == ("model_not_found", "training_failed")
    assert away.may_pass
    assert unreadable.may_pass


class NoRoom(io.TextIOBase):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_though_the_log_lies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, out = telling(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", NoRoom())
        tell.on_log("info", "on it goes")
        words = last_words(spec_of(tmp_path, training_path="files/none"), tell)
    assert "on it goes" in out.getvalue()
    assert isinstance(words, FailedMessage)
    assert words.is_explained


@pytest.mark.parametrize("where", ["checkpoints", ".source"])
def test_a_full_disk_is_known_by_its_code_wherever_it_is_met(tmp_path: Path, where: str) -> None:
    tell, _ = telling(tmp_path)
    stored = tmp_path / "files" / "file-1.zip"
    stored.parent.mkdir()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("main.py", "print(1)")
    with no_room_below(tmp_path / "finetune_output/code" / where):
        words = last_words(spec_of(tmp_path, training_path="files/file-1.zip"), tell)
    assert isinstance(words, FailedMessage)
    assert (words.code, words.is_explained) == ("insufficient_storage", True)
    assert "finetune_output/code could not be written. Free some space" in words.message


def test_the_engines_news_becomes_messages(tmp_path: Path) -> None:
    tell, out = telling(tmp_path)
    tell.on_phase("data", "whatever the engine says")
    tell.on_step(
        StepMetrics(
            step=1,
            total_steps=2,
            loss=0.5,
            lr=1e-4,
            tokens_per_second=9,
            eta_s=3,
            epoch=0.5,
            peak_memory_bytes=7,
            trained_tokens=11,
            token_accuracy=0.75,
        )
    )
    tell.on_checkpoint(CheckpointInfo(1, tmp_path / "finetune_output/code/checkpoints/checkpoint-1", 0.5))
    tell.on_eval(Evaluation("base", 0, 2.5, 0.25))
    tell.on_answers(3, [GeneratedAnswer("Who?", "Me.")])
    tell.on_log("warn", "careful")

    phase, step, checkpoint, evaluated, answered, log = said(out)
    assert phase.detail == "Preparing data"  # type: ignore[attr-defined]
    assert isinstance(step, StepMessage)
    assert (step.learning_rate, step.eta_s, step.train_token_accuracy) == (1e-4, 3, 0.75)
    assert checkpoint.path == "finetune_output/code/checkpoints/checkpoint-1"  # type: ignore[attr-defined]
    assert isinstance(evaluated, EvalMessage)
    assert (evaluated.of, evaluated.loss, evaluated.token_accuracy) == ("base", 2.5, 0.25)
    assert evaluated.perplexity == pytest.approx(12.18, abs=0.01)
    assert evaluated.text == (
        "Held-out loss of the base model: 2.5000, perplexity 12.18, token accuracy 25.0%"
    )
    assert (answered.prompt, answered.answer) == ("Who?", "Me.")  # type: ignore[attr-defined]
    assert log.level == "warn"  # type: ignore[attr-defined]
    assert all(json.loads(line) for line in out.getvalue().splitlines())


def test_sigterm_is_a_request_while_training_and_an_end_before(tmp_path: Path) -> None:
    tell, _ = telling(tmp_path)
    tell.on_phase("training", "")
    assert tell.should_stop() is None
    tell.on_sigterm(signal.SIGTERM, None)
    assert tell.should_stop() == "save_and_stop"
    tell.on_phase("saving", "")

    early, _ = telling(tmp_path)
    early.on_phase("loading", "")
    with pytest.raises(StopNow):
        early.on_sigterm(signal.SIGTERM, None)
    with pytest.raises(StopNow):
        early.on_phase("base_model", "")


def test_a_rung_is_left_to_a_new_process_unless_a_gpu_gives_its_memory_back(tmp_path: Path) -> None:
    rung = Rung(name="halve_batch", change="per_device_train_batch_size 2 → 1", config=TrainingConfig())
    with pytest.raises(RestartNow):
        telling(tmp_path)[0].on_rung(rung)
    telling(tmp_path, "cuda:0")[0].on_rung(rung)
