"""A clock that is set, a machine that sleeps, an orchestrator that is away: no worker is lost by that, and no
lost one kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.orm import Session
from tests.fakes.orchestrator_rig import GIB, HandClock, Rig, open_rig

from sage_contracts.errors import ServiceUnavailableError
from sage_orchestrator.clock import Jumps, Rounds
from sage_orchestrator.database import Database

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


def hold_all(rig: Rig) -> tuple[str, str]:
    """(a running job, a running merge); an engine has memory beside them."""
    rig.train(suffix="done")
    merge_id = rig.post("/v1/sage/models/done/merge")["id"]
    rig.post(f"/internal/merges/{merge_id}/claim", {"worker_id": "m1"})
    rig.lease("engine:1", GIB)
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    return job_id, merge_id


def require_held(rig: Rig, job_id: str, merge_id: str) -> None:
    assert rig.report(job_id)["order"] == "continue"
    rig.post(f"/internal/merges/{merge_id}/events", {"worker_id": "m1", "attempt": 1, "phase": "writing"})
    [device] = rig.parts.devices.states()
    assert {lease.holder for lease in device.leases} == {"engine:1", f"train:{job_id}"}


def test_whoever_could_not_be_heard_is_not_lost(rig: Rig) -> None:
    held = hold_all(rig)
    for _ in range(5):  # as often as workers may be lost
        rig.clock.advance(HOUR_S)  # the database is away
        rig.sweep_after_silence()
        require_held(rig, *held)
    rig.clock.advance(31)
    assert rig.sweep() == list(held)


def test_an_orchestrator_that_starts_again_hears_its_workers_before_it_misses_them(home: Path) -> None:
    with open_rig(home) as rig:
        held = hold_all(rig)
        now = rig.clock.now
    with open_rig(home, now=now + HOUR_S) as rig:
        rig.sweep_after_silence()
        require_held(rig, *held)
    with open_rig(home, now=now + 2 * HOUR_S) as rig:
        rig.clock.advance(29)
        assert rig.sweep() == []
        rig.clock.advance(1)
        assert rig.sweep() == list(held)


class AwayDatabase(Database):
    """It can be read and not written, as on a disk that is full, while `is_away`."""

    is_away = False

    @contextmanager
    def write(self) -> Iterator[Session]:
        if self.is_away:
            raise ServiceUnavailableError("away")
        with super().write() as session:
            yield session


def test_a_round_that_failed_is_a_silence_however_short(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    database = AwayDatabase(str(rig.parts.database.engine.url))
    sweeper = replace(rig.parts.sweeper, database=database)
    rig.clock.advance(29)
    sweeper.rounds.end()
    database.is_away = True
    sweeper.sweep()  # nothing to write yet
    rig.clock.advance(2)
    with pytest.raises(ServiceUnavailableError):
        sweeper.sweep()
    database.is_away = False
    rig.clock.advance(2)
    assert not sweeper.sweep()
    assert rig.report(job_id)["order"] == "continue"
    database.close()


def test_rounds_have_a_gap_before_the_first_and_after_one_that_failed_or_is_long_ago() -> None:
    clock = HandClock()
    rounds = Rounds(clock, 10)
    assert rounds.have_gap
    rounds.begin()
    assert rounds.have_gap
    rounds.end()
    clock.advance(10)
    assert not rounds.have_gap
    clock.advance(1)
    assert rounds.have_gap
