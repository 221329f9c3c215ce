"""The child that waits for the next job: real processes that speak the protocol, without torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.small_disk import no_room_below

from sage_contracts.config import TrainingConfig
from sage_contracts.workers import TrainClaim
from sage_servicekit.children import Child
from sage_servicekit.machine import Device
from sage_servicekit.worker import OrchestratorLink
from sage_trainer.runner import TrainerPost, TrainRunner
from sage_trainer.settings import TrainerSettings
from sage_trainer.spare import Spare

WAITS = """
import sys
from sage_servicekit.children import append_output_to, end_with_parent, take_stdout
from sage_trainer.messages import ChildOrder
orders, out = end_with_parent(), take_stdout()
out.write("ready\\n")
order = ChildOrder.model_validate_json(orders.get(timeout=30))
append_output_to(order.log)
print("for the log", flush=True)
out.write(order.spec.read_text() + "\\n")
"""


@pytest.fixture
def spare(tmp_path: Path) -> Iterator[Spare]:
    made = Spare([sys.executable, "-c", WAITS], os.environ, tmp_path / "spare.log")
    yield made
    made.close()


def lines_until_end(child: Child) -> list[bytes]:
    lines: list[bytes] = []
    while not child.has_ended():
        lines += child.receive(30)
    child.reap()
    return lines + child.receive(0)


def test_the_waiting_child_takes_the_job_and_its_log(spare: Spare, tmp_path: Path) -> None:
    spec, log = tmp_path / "spec.json", tmp_path / "job" / "train.log"
    spec.write_text("the spec")
    spare.keep("a-base")
    child = spare.take(spec, log)
    assert child is not None
    assert lines_until_end(child) == [b"ready\n", b"the spec\n"]
    assert log.read_text() == "for the log\n"
    assert spare.take(spec, log) is None, "one job a child, and the next is started when the trainer is idle"


def test_keeping_twice_keeps_one(spare: Spare, tmp_path: Path) -> None:
    spare.keep("a-base")
    first = spare._child
    spare.keep("a-base")
    assert spare._child is first


def test_a_waiting_child_that_died_is_passed_over_and_replaced(spare: Spare, tmp_path: Path) -> None:
    spare.keep("a-base")
    assert spare._child is not None
    spare._child.kill()
    while not spare._child.has_ended():
        spare._child.receive(1)
    assert spare.take(tmp_path / "spec.json", tmp_path / "log") is None
    spare.keep("a-base")
    assert spare._child is not None


def test_a_waiting_child_is_not_sent_to_a_log_that_the_disk_has_no_room_for(
    spare: Spare, tmp_path: Path
) -> None:
    spare.keep("a-base")
    assert spare._child is not None
    pid = spare._child.pid
    with no_room_below(tmp_path / "job"):
        assert spare.take(tmp_path / "spec.json", tmp_path / "job" / "train.log") is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_closed_spare_leaves_no_process_and_starts_none(spare: Spare) -> None:
    spare.keep("a-base")
    assert spare._child is not None
    pid = spare._child.pid
    spare.close()
    spare.keep("a-base")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_a_command_jobs_start_their_own(tmp_path: Path) -> None:
    never = Spare(None, {}, tmp_path / "spare.log")
    never.keep("a-base")
    assert never.take(tmp_path / "spec.json", tmp_path / "log") is None


@pytest.mark.parametrize("is_stopping", [False, True])
def test_a_child_is_kept_after_a_job_unless_the_trainer_is_told_to_stop(
    spare: Spare, tmp_path: Path, is_stopping: bool
) -> None:
    settings = TrainerSettings(
        home_dir=tmp_path,
        orchestrator_url="http://127.0.0.1:1",  # nobody hears the end
        train_child_command=[sys.executable, "-c", "raise SystemExit(3)"],
        finish_patience_s=0,
    )
    stopping = threading.Event()
    if is_stopping:
        stopping.set()
    link, device = OrchestratorLink(settings, timeout_s=1.0), Device("cpu", 2**30)
    claim = TrainClaim(
        job_id="job-1", attempt=1, lease_s=60, name="sums", version=1, config=TrainingConfig(),
        output_dir="finetune_output/sums",
    )  # fmt: skip
    TrainRunner(TrainerPost(settings, link, "trainer-1", device, stopping, spare))._attempt(claim)
    assert (spare._child is None) == is_stopping
