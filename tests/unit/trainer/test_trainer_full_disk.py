"""A trainer that finds the disk full: the run is paused and keeps what it has."""

from __future__ import annotations

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


def test_an_attempt_whose_spec_has_no_room_is_paused_with_its_checkpoints(tmp_path: Path) -> None:
    checkpoints = tmp_path / "finetune_output/sums/checkpoints"
    (checkpoints / "checkpoint-5").mkdir(parents=True)
    (checkpoints / "job_id").write_text("job-1")
    settings = TrainerSettings(home_dir=tmp_path)
    link, spare = Hearing(settings), Spare(None, {}, tmp_path / "spare.log")
    claim = TrainClaim(
        job_id="job-1", attempt=1, lease_s=60, name="sums", version=1, config=TrainingConfig(),
        output_dir="finetune_output/sums",
    )  # fmt: skip
    post = TrainerPost(settings, link, "trainer-1", Device("cpu", 2**30), threading.Event(), spare)
    with no_room_below(tmp_path / "run"):
        TrainAttempt(post, claim).run()
    [finish] = link.finishes
    assert (finish.outcome, finish.error_code) == (Outcome.SUSPENDED, "insufficient_storage")
    assert "Free some space" in (finish.error_message or "")
    assert (checkpoints / "job_id").read_text() == "job-1"
