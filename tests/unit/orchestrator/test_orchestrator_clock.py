"""A clock that somebody sets, and a machine that sleeps: no worker is lost by that, and no lost one kept."""

from __future__ import annotations

import pytest
from tests.fakes.orchestrator_rig import GIB, HandClock, Rig

from sage_orchestrator.clock import Jumps

HOUR_S = 3600.0


@pytest.mark.parametrize("jump_s", [HOUR_S, 40.0, -40.0, -HOUR_S])
def test_a_running_job_stays_its_worker_s_when_the_clock_jumps(rig: Rig, jump_s: float) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    for _ in range(5):  # as often as workers may be lost
        rig.clock.set_by(jump_s)
        rig.sweep()
        assert rig.report(job_id)["order"] == "continue"
    assert rig.job(job_id)["sage"]["attempt"] == 1


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_a_worker_that_is_lost_about_then_is_missed_after_its_lease(rig: Rig, jump_s: float) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.clock.set_by(jump_s)
    rig.sweep()
    rig.clock.advance(31)
    assert rig.sweep() == [job_id]
    assert rig.job(job_id)["status"] == "queued"


def test_a_lease_that_had_run_out_before_is_not_given_anew(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    rig.clock.advance(31)
    rig.clock.set_by(HOUR_S)
    rig.sweep()
    assert rig.job(job_id)["status"] == "queued"


def test_bells_do_not_wait_for_the_hour_that_the_clock_was_set_back(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    assert rig.sweep() == [job_id]
    rig.clock.set_by(-HOUR_S)
    assert rig.sweep() == [job_id]


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_workers_are_up_as_they_were(rig: Rig, jump_s: float) -> None:
    beat = {"worker_id": "w1", "kind": "trainer", "device": "cpu", "device_total_bytes": 8 * GIB}
    rig.post("/internal/workers/beat", beat, status=204)
    rig.clock.set_by(jump_s)
    rig.sweep()
    assert [worker["is_up"] for worker in rig.get("/internal/workers")["data"]] == [True]
    rig.clock.advance(31)
    assert [worker["is_up"] for worker in rig.get("/internal/workers")["data"]] == [False]


def test_time_that_passes_and_a_clock_that_is_put_right_a_little_are_no_jumps() -> None:
    clock = HandClock()
    jumps = Jumps(clock, lambda: clock.passed_s)
    clock.advance(HOUR_S)
    assert jumps.since_last() == 0
    clock.set_by(0.5)
    assert jumps.since_last() == 0
    clock.set_by(-10)
    assert (jumps.since_last(), jumps.since_last()) == (-10, 0)
