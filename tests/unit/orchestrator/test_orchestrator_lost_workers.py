"""Attempts that do not end as they began: lost workers, orders from outside, bells that nobody hears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from sqlalchemy.orm import Session
from tests.fakes.orchestrator_rig import Rig

from sage_contracts.jobs import JobStatus
from sage_contracts.workers import Order, Outcome
from sage_orchestrator.database import Database
from sage_orchestrator.jobs.attempts import target_of

JOBS = "/v1/fine_tuning/jobs"


def test_a_lost_worker_is_replaced_and_its_late_words_are_refused(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.sweep()
    rig.claim(job_id)
    rig.clock.advance(29)
    assert rig.sweep() == []
    rig.clock.advance(1)
    assert rig.sweep() == [job_id]
    assert rig.job(job_id)["status"] == "queued"
    assert "worker lost; resuming" in rig.messages(job_id)
    rig.report(job_id, status=409)
    again = rig.claim(job_id, "w2")
    assert (again["attempt"], again["version"]) == (2, 1)
    assert rig.report(job_id, status=409)["error"]["code"] == "not_yours"
    rig.finish(job_id, status=409)
    # Not even the right number helps somebody else.
    rig.report(job_id, attempt=2, worker="w1", status=409)
    assert rig.finish(job_id, attempt=2, worker="w2")["fine_tuned_model"] == "code@1"


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled", "paused", "suspended", "released"])
@pytest.mark.parametrize("owner", [None, "pause", "cancel"])
def test_an_end_that_comes_after_the_job_was_taken_back_is_taken_for_no_repetition(
    rig: Rig, outcome: str, owner: str | None
) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    if owner:
        rig.post(f"{JOBS}/{job_id}/{owner}")
    rig.clock.advance(31)
    rig.sweep()
    status = rig.job(job_id)["status"]
    # Where it stands as this end would have left it, the worker need not know that it came too late.
    led_there = {
        "queued": {"paused", "released"},
        "paused": {"paused", "suspended", "released"},
        "cancelled": {"succeeded", "failed", "cancelled", "paused", "suspended", "released"},
    }
    is_known = outcome in led_there[status]
    rig.finish(job_id, outcome, status=200 if is_known else 409)
    assert rig.job(job_id)["status"] == status


def test_a_report_renews_the_lease(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.sweep()
    rig.claim(job_id)
    for _ in range(4):
        rig.clock.advance(20)
        assert rig.report(job_id) == {"order": "continue", "lease_s": 30.0}
        assert rig.sweep() == []


def test_a_job_that_loses_worker_after_worker_fails(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    for attempt in range(1, 6):
        assert rig.claim(job_id)["attempt"] == attempt
        rig.clock.advance(31)
        rig.sweep()
    job = rig.job(job_id)
    assert job["status"] == "failed"
    assert "5 workers were lost" in job["error"]["message"]


def test_workers_that_leave_in_good_order_do_not_use_up_a_job(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    for attempt in range(1, 9):
        rig.claim(job_id)
        rig.finish(job_id, "released", attempt)
        assert rig.sweep() == [job_id]
    assert rig.job(job_id)["status"] == "queued"


def test_cancel_is_at_once_while_nobody_works_and_an_order_otherwise(rig: Rig) -> None:
    waiting, running = rig.create_job(suffix="a")["id"], rig.create_job(suffix="b")["id"]
    assert rig.post(f"{JOBS}/{waiting}/cancel")["status"] == "cancelled"
    rig.claim(waiting, status=409)
    rig.claim(running)
    assert rig.post(f"{JOBS}/{running}/cancel")["status"] == "running"
    assert rig.report(running)["order"] == "cancel"
    assert rig.finish(running, "cancelled")["status"] == "cancelled"
    # Again is fine; of something that ended otherwise it is not.
    assert rig.post(f"{JOBS}/{running}/cancel")["status"] == "cancelled"
    done = rig.train(suffix="c")["id"]
    rig.post(f"{JOBS}/{done}/cancel", status=409)


def test_pause_and_resume(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.sweep()
    assert rig.post(f"{JOBS}/{job_id}/pause")["status"] == "paused"
    rig.clock.advance(10_000)
    assert rig.sweep() == []
    assert rig.post(f"{JOBS}/{job_id}/resume")["status"] == "queued"
    assert rig.sweep() == [job_id]
    rig.claim(job_id)
    rig.post(f"{JOBS}/{job_id}/pause")
    assert rig.report(job_id)["order"] == "pause"
    assert rig.finish(job_id, "paused")["status"] == "paused"
    rig.post(f"{JOBS}/{job_id}/resume")
    assert rig.claim(job_id)["attempt"] == 2


def test_a_pause_taken_back_in_time_never_happens(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.post(f"{JOBS}/{job_id}/pause")
    rig.post(f"{JOBS}/{job_id}/resume")
    assert rig.report(job_id)["order"] == "continue"


def test_workers_that_got_a_job_further_may_be_lost_any_number_of_times(rig: Rig) -> None:
    """As on machines that are taken away every few hours."""
    job_id = rig.create_job()["id"]
    for attempt in range(1, 8):
        rig.claim(job_id)
        checkpoint = {"step": 10 * attempt, "path": f"c/{attempt}", "train_loss": 1.0}
        rig.report(job_id, attempt, checkpoints=[checkpoint])
        rig.clock.advance(31)
        rig.sweep()
        assert rig.job(job_id)["status"] == "queued"
    for attempt in range(8, 12):
        assert rig.job(job_id)["status"] == "queued"
        rig.claim(job_id)
        rig.report(job_id, attempt, checkpoints=[{"step": 70, "path": "c/7", "train_loss": 1.0}])  # again
        rig.clock.advance(31)
        rig.sweep()
    job = rig.job(job_id)
    assert job["status"] == "failed"
    assert "5 workers were lost" in job["error"]["message"]


def test_orders_to_a_lost_worker_are_carried_out(rig: Rig) -> None:
    cancelled, paused = rig.create_job(suffix="a")["id"], rig.create_job(suffix="b")["id"]
    rig.claim(cancelled)
    rig.claim(paused, "w2")
    rig.post(f"{JOBS}/{cancelled}/cancel")
    rig.post(f"{JOBS}/{paused}/pause")
    rig.clock.advance(31)
    assert rig.sweep() == []
    assert [rig.job(job_id)["status"] for job_id in (cancelled, paused)] == ["cancelled", "paused"]


class MeanwhileDatabase(Database):
    """Lets something happen before its next change."""

    meanwhile: Callable[[], object] | None = None

    @contextmanager
    def write(self) -> Iterator[Session]:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        with super().write() as session:
            yield session


@pytest.mark.parametrize(
    ("order", "status"), [("cancel", "cancelled"), ("pause", "paused"), ("report", "running")]
)
def test_what_is_said_while_a_lost_worker_s_job_is_taken_back_counts(
    rig: Rig, order: str, status: str
) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.clock.advance(31)
    database = MeanwhileDatabase(str(rig.parts.database.engine.url))
    said = {
        "cancel": lambda: rig.post(f"{JOBS}/{job_id}/cancel"),
        "pause": lambda: rig.post(f"{JOBS}/{job_id}/pause"),
        "report": lambda: rig.report(job_id),
    }
    database.meanwhile = said[order]
    replace(rig.parts.sweeper, database=database).take_back()
    database.close()
    assert rig.job(job_id)["status"] == status


@pytest.mark.parametrize(
    ("outcome", "order", "target"),
    [
        (Outcome.SUCCEEDED, Order.CANCEL, JobStatus.SUCCEEDED),
        (Outcome.FAILED, Order.CONTINUE, JobStatus.FAILED),
        (Outcome.FAILED, Order.CANCEL, JobStatus.CANCELLED),
        (Outcome.PAUSED, Order.PAUSE, JobStatus.PAUSED),
        (Outcome.PAUSED, Order.CONTINUE, JobStatus.QUEUED),
        (Outcome.PAUSED, Order.CANCEL, JobStatus.CANCELLED),
        (Outcome.SUSPENDED, Order.CONTINUE, JobStatus.PAUSED),
        (Outcome.SUSPENDED, Order.PAUSE, JobStatus.PAUSED),
        (Outcome.SUSPENDED, Order.CANCEL, JobStatus.CANCELLED),
        (Outcome.RELEASED, Order.CONTINUE, JobStatus.QUEUED),
        (Outcome.RELEASED, Order.PAUSE, JobStatus.PAUSED),
        (Outcome.RELEASED, Order.CANCEL, JobStatus.CANCELLED),
    ],
)
def test_the_owners_last_word_decides_where_an_attempt_ends(
    outcome: Outcome, order: Order, target: JobStatus
) -> None:
    assert target_of(outcome, order) is target


def test_a_job_that_cannot_go_on_is_paused_with_the_reason_until_it_is_resumed(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    full = {"error_code": "insufficient_storage", "error_message": "The disk is full: free some."}
    rig.finish(job_id, "suspended", **full)
    job = rig.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("paused", "insufficient_storage")
    newest = rig.get(f"{JOBS}/{job_id}/events")["data"][0]
    assert newest["level"] == "error"
    assert newest["message"].endswith("The disk is full: free some.")
    resumed = rig.post(f"{JOBS}/{job_id}/resume")
    assert (resumed["status"], resumed["error"]) == ("queued", None)
    assert rig.claim(job_id)["attempt"] == 2


def test_a_broker_that_is_down_loses_nothing(rig: Rig) -> None:
    rig.bell.is_down = True
    job_id = rig.create_job()["id"]
    assert rig.sweep() == []
    assert rig.job(job_id)["status"] == "queued"
    rig.bell.is_down = False
    assert rig.sweep() == []
    rig.clock.advance(5)
    assert rig.sweep() == [job_id]


def test_an_unanswered_bell_rings_again_less_and_less_often(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    assert rig.sweep() == [job_id]
    waits = []
    for _ in range(7):
        waited = 0
        while not rig.sweep():
            rig.clock.advance(30)
            waited += 30
        waits.append(waited)
    assert waits == [30, 60, 120, 240, 480, 480, 480]
    rig.claim(job_id)
    rig.report(job_id)
    assert rig.sweep() == []
