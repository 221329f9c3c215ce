"""A trainer that the system refuses what it needs: the run is paused and keeps what it has."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from pydantic import BaseModel
from tests.fakes.small_disk import no_room_below

from sage_contracts.config import TrainingConfig
from sage_contracts.workers import Finish, Outcome, TrainClaim
from sage_servicekit.machine import Device
from sage_servicekit.worker import OrchestratorLink
from sage_trainer.runner import TrainAttempt, TrainerPost
from sage_trainer.settings import TrainerSettings
from sage_trainer.spare import Spare


class Hearing(OrchestratorLink):
    """Keeps how attempts ended."""

    def __init__(self, settings: TrainerSettings) -> None:
        super().__init__(settings)
        self.finishes: list[Finish] = []

    def _send(self, path: str, message: BaseModel) -> bytes:
        if isinstance(message, Finish):
            self.finishes.append(message)
        return b"{}"


def checkpoint_in(home: Path) -> Path:
    checkpoints = home / "finetune_output/sums/checkpoints"
    (checkpoints / "checkpoint-5").mkdir(parents=True)
    (checkpoints / "checkpoint-5/manifest.json").write_text("{}")
    (checkpoints / "job_id").write_text("job-1")
    return checkpoints


def attempt_in(home: Path, **values: object) -> tuple[TrainAttempt, Hearing]:
    settings = TrainerSettings.model_validate({"home_dir": home, **values})
    link, spare = Hearing(settings), Spare(None, {}, home / "spare.log")
    claim = TrainClaim(
        job_id="job-1", attempt=1, lease_s=60, name="sums", version=1, config=TrainingConfig(),
        output_dir="finetune_output/sums",
    )  # fmt: skip
    post = TrainerPost(settings, link, "trainer-1", Device("cpu", 2**30), threading.Event(), spare)
    return TrainAttempt(post, claim), link


def test_an_attempt_whose_spec_has_no_room_is_paused_with_its_checkpoints(tmp_path: Path) -> None:
    checkpoints = checkpoint_in(tmp_path)
    attempt, link = attempt_in(tmp_path)
    with no_room_below(tmp_path / "run"):
        attempt.run()
    [finish] = link.finishes
    assert (finish.outcome, finish.error_code) == (Outcome.SUSPENDED, "insufficient_storage")
    assert "Free some space" in (finish.error_message or "")
    assert (checkpoints / "job_id").read_text() == "job-1"


def test_an_attempt_whose_child_cannot_be_started_is_paused_where_it_has_a_checkpoint(tmp_path: Path) -> None:
    command = [str(tmp_path / "away")]
    attempt, link = attempt_in(tmp_path, train_child_command=command)
    attempt.run()
    checkpoints = checkpoint_in(tmp_path)
    again, later = attempt_in(tmp_path, train_child_command=command)
    again.run()
    assert [finish.outcome for finish in link.finishes + later.finishes] == [
        Outcome.FAILED,
        Outcome.SUSPENDED,
    ]
    assert "`sage finetune resume`" in (later.finishes[0].error_message or "")
    assert (checkpoints / "job_id").read_text() == "job-1"


def test_what_a_child_had_begun_when_it_died_goes_with_it(tmp_path: Path) -> None:
    checkpoints = checkpoint_in(tmp_path)
    code = f"import os, sys; os.mkdir({str(checkpoints / '.checkpoint-9.x1')!r}); sys.exit(3)"
    attempt, link = attempt_in(tmp_path, train_child_command=[sys.executable, "-c", code])
    attempt.run()
    assert "exit code 3" in (link.finishes[0].error_message or "")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-5", "job_id"]
