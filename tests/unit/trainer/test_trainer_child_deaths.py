"""What a child's death means, and how the run goes on in the next one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from sage_contracts.config import TrainingConfig
from sage_contracts.workers import TrainClaim
from sage_trainer.child_deaths import Cause, ChildDeaths, NextChild, cause_of
from sage_trainer.ending import Ending


@pytest.mark.parametrize(
    ("exit_code", "log", "kernel_kills", "unexplained", "cause"),
    [
        (-9, "", 1, 0, Cause.KERNEL),
        (137, "", 2, 0, Cause.KERNEL),
        (-9, "", None, 0, Cause.PROBABLY),
        (-9, "", 0, 0, Cause.SOMEBODY),
        (-9, "", 0, 1, Cause.PROBABLY),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", 0, 0, Cause.ALLOCATION),
        (1, "OSError: [Errno 12] Cannot allocate memory", None, 0, Cause.ALLOCATION),
        (1, "Error out of memory at line 60 in file /src/csrc/ops.cu", 0, 0, Cause.ALLOCATION),
        (1, "Error invalid argument at line 60 in file /src/csrc/ops.cu", 0, 0, Cause.OTHER),
        (-11, "", None, 0, Cause.SIGNAL),
        (-7, "", 0, 1, Cause.SIGNAL),
        (3, "RuntimeError: no", 1, 0, Cause.OTHER),
        (0, "bad_alloc", None, 0, Cause.OTHER),
    ],
)
def test_causes(exit_code: int, log: str, kernel_kills: int | None, unexplained: int, cause: Cause) -> None:
    assert cause_of(exit_code, log, kernel_kills, unexplained) is cause


def put_checkpoint(output_dir: Path, job_id: str = "job-1") -> Path:
    """A checkpoint that was written to its end. Returns the folder of all."""
    folder = output_dir / "checkpoints"
    (folder / "checkpoint-6").mkdir(parents=True)
    (folder / "checkpoint-6/manifest.json").write_text("{}")
    (folder / "job_id").write_text(job_id)
    return folder


def deaths_of(checkpoints: Path, kills: Callable[[], int | None], **config: object) -> ChildDeaths:
    claim = TrainClaim(
        job_id="job-1",
        attempt=1,
        lease_s=30,
        name="code",
        version=1,
        config=TrainingConfig.model_validate({"per_device_train_batch_size": 4, **config}),
        output_dir="finetune_output/code",
    )
    return ChildDeaths(claim, checkpoints, "cuda:0", kills)


def test_the_kernel_can_kill_as_often_as_there_are_rungs(tmp_path: Path) -> None:
    kills = count()
    deaths = deaths_of(tmp_path, lambda: next(kills))
    lives: list[NextChild] = []
    while True:
        deaths.begin()
        after = deaths.after(-9, "")
        if not isinstance(after, NextChild):
            break
        lives.append(after)
    assert [life.rungs[-1] for life in lives] == [
        "halve_batch", "halve_batch", "gradient_checkpointing", "load_in_8bit", "load_in_4bit",
    ]  # fmt: skip
    assert lives[-1].rungs == tuple(life.rungs[-1] for life in lives)
    assert "The kernel killed the training process" in lives[0].message
    assert "per_device_train_batch_size 4 → 2" in lives[0].message
    assert isinstance(after, Ending)
    assert after.error_code == "out_of_memory"
    assert "in vain: halve_batch" in (after.error_message or "")


def test_one_kill_by_somebody_changes_nothing_and_a_second_one_does(tmp_path: Path) -> None:
    deaths = deaths_of(tmp_path, lambda: 7)
    deaths.begin()
    first = deaths.after(-9, "")
    second = deaths.after(-9, "")
    assert isinstance(first, NextChild)
    assert first.rungs == ()
    assert "not by the kernel" in first.message
    assert isinstance(second, NextChild)
    assert second.rungs == ("halve_batch",)
    assert "probably" in second.message


def test_rungs_that_the_child_took_by_itself_count(tmp_path: Path) -> None:
    record = {"run_id": "job-1", "asked": {}, "rungs": ["halve_batch", "halve_batch"]}
    (tmp_path / "oom_rungs.json").write_text(json.dumps(record))
    after = deaths_of(tmp_path, lambda: None).after(-9, "")
    assert isinstance(after, NextChild)
    assert after.rungs == ("halve_batch", "halve_batch", "gradient_checkpointing")
    (tmp_path / "oom_rungs.json").write_text(json.dumps({**record, "run_id": "job-0"}))
    other = deaths_of(tmp_path, lambda: None).after(-9, "")
    assert isinstance(other, NextChild)
    assert other.rungs == ("halve_batch",)


def test_without_a_ladder_a_kill_is_the_end_and_other_deaths_are_not_ours(tmp_path: Path) -> None:
    deaths = deaths_of(tmp_path, lambda: None, oom_ladder="off")
    ending = deaths.after(-9, "")
    assert isinstance(ending, Ending)
    assert ending.error_code == "out_of_memory"
    assert "probably because memory had run out" in (ending.error_message or "")
    assert deaths.after(-11, "") is None


def test_a_death_by_signal_is_tried_once_more_from_a_checkpoint(tmp_path: Path) -> None:
    deaths = deaths_of(put_checkpoint(tmp_path), lambda: 0)
    first = deaths.after(-7, "")
    assert isinstance(first, NextChild)
    assert first.rungs == ()
    assert "signal SIGBUS" in first.message
    assert "from its last checkpoint" in first.message
    assert deaths.after(-7, "") is None
    assert deaths.after(3, "") is None


def test_a_death_by_signal_without_a_checkpoint_of_its_own_is_final(tmp_path: Path) -> None:
    assert deaths_of(tmp_path / "checkpoints", lambda: 0).after(-7, "") is None
    others = put_checkpoint(tmp_path, "job-0")
    assert deaths_of(others, lambda: 0).after(-7, "") is None
