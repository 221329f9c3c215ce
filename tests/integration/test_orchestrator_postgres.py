"""The same orchestrator on a real PostgreSQL server."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from tests.fakes.orchestrator_machine import run_job_machine
from tests.fakes.orchestrator_rig import GIB, Rig, open_rig, rows
from tests.fakes.postgres_server import running_postgres
from tests.fakes.upload_calls import begin, cancel, kept, send

from sage_contracts.errors import NotYoursError, SageError, ServiceUnavailableError
from sage_contracts.uploads import CompleteUploadRequest
from sage_contracts.workers import ClaimRequest, Finish, Outcome
from sage_orchestrator.database import HEAD, Database
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.models import repository as models
from sage_orchestrator.rows import Base
from sage_orchestrator.settings import OrchestratorSettings

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(scope="module")
def rig(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    home = tmp_path_factory.mktemp("home")
    (home / "state").mkdir()
    with open_rig(home, database_url=postgres) as opened:
        yield opened


@pytest.fixture(autouse=True)
def emptied(rig: Rig) -> None:
    rig.reset()


def at_once(works: list[Any]) -> list[SageError | Any]:
    """The results of calls that start together; errors as values."""
    results: list[SageError | Any] = []
    together = threading.Barrier(len(works))

    def run(work: Any) -> None:
        together.wait(10)
        try:
            results.append(work())
        except SageError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_several_starters_upgrade_once(postgres: str, rig: Rig) -> None:
    url = OrchestratorSettings(database_url=postgres).resolved_database_url
    with rig.parts.database.write() as session:
        session.execute(text("DROP SCHEMA public CASCADE"))
        session.execute(text("CREATE SCHEMA public"))
    databases = [Database(url) for _ in range(3)]
    assert at_once([database.upgrade for database in databases]) == [None] * 3
    with databases[0].engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == HEAD
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    for database in databases:
        database.close()


def test_checkpoints_find_the_events_of_their_steps(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    rig.claim(job_id)
    said = [{"step": 2, "train_loss": 3.0}, {"step": 4, "full_valid_loss": 1.25}, {"prompt": "?"}, None]
    events = [
        {"seq": seq, "created_at": 5.0, "message": "news", "data": data} for seq, data in enumerate(said, 1)
    ]
    rig.report(job_id, events=events, checkpoints=[{"step": step, "path": f"c/{step}"} for step in (2, 4)])
    listed = rig.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints")["data"]
    fourth, second = (item["metrics"] for item in listed)
    assert (second["train_loss"], second["full_valid_loss"]) == (3.0, None)
    assert (fourth["train_loss"], fourth["full_valid_loss"]) == (None, 1.25)


def test_a_version_that_no_column_could_hold_is_unknown(rig: Rig) -> None:
    for digits in ("999999999", "9999999999", "99999999999999999999"):
        assert rig.get(f"/v1/models/code@{digits}", status=404)["error"]["code"] == "model_not_found"


def test_a_job_from_file_to_model(rig: Rig) -> None:
    file_id = rig.upload(rows())
    job = rig.create_job(training_file=file_id, suffix="pg", metadata={"team": "a"})
    assert rig.sweep() == [job["id"]]
    rig.claim(job["id"])
    rig.report(job["id"], checkpoints=[{"step": 1, "path": "c"}], metrics={"base_eval_loss": 2.0})
    assert rig.finish(job["id"])["fine_tuned_model"] == "pg@1"
    assert rig.get("/internal/models/resolve", name="pg")["id"] == "pg@1"
    found = rig.get("/v1/fine_tuning/jobs", **{"metadata[team]": "a"})["data"]
    assert [item["id"] for item in found] == [job["id"]]
    assert rig.messages(job["id"])[-2:] == ["Started on w1, cpu", "New fine-tuned model created: pg@1"]


def test_a_sweep_that_several_look_after_ends_once(rig: Rig) -> None:
    body = {"model": "smollm2-135m", "sage": {"task": "code"}, "grid": {"lora.r": [4, 8]}}
    sweep = rig.post("/v1/sage/sweeps", body)
    for child in sweep["children"]:
        rig.claim(child["job_id"])
        rig.finish(child["job_id"], metrics={"eval_loss": 1.0})
    assert at_once([rig.parts.sweeps.tend] * 4) == [None] * 4
    ended = rig.get(f"/v1/sage/sweeps/{sweep['id']}")
    assert (ended["status"], ended["fine_tuned_model"]) == ("succeeded", "code@1")
    assert {card["id"] for card in rig.get("/v1/models")["data"] if card["id"].startswith("code@")} == {
        "code@1"
    }


def test_of_many_workers_one_gets_the_job(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    asks = [
        ClaimRequest(worker_id=f"w{number}", device=f"cuda:{number}", device_total_bytes=GIB)
        for number in range(6)
    ]
    results = at_once([lambda ask=ask: rig.parts.attempts.claim(job_id, ask) for ask in asks])
    assert sum(isinstance(result, NotYoursError) for result in results) == 5


def test_of_many_jobs_of_one_name_one_runs(rig: Rig) -> None:
    ids = [rig.create_job()["id"] for _ in range(4)]
    asks = {
        job_id: ClaimRequest(worker_id=job_id, device=f"cuda:{number}", device_total_bytes=GIB)
        for number, job_id in enumerate(ids)
    }
    results = at_once(
        [lambda job_id=job_id, ask=ask: rig.parts.attempts.claim(job_id, ask) for job_id, ask in asks.items()]
    )
    assert sum(isinstance(result, NotYoursError) for result in results) == 3
    assert [job["status"] for job in rig.get("/v1/fine_tuning/jobs")["data"]].count("running") == 1


def test_jobs_of_one_name_are_ended_begun_and_stopped_at_once(rig: Rig) -> None:
    for number in range(6):
        ids = [rig.create_job(suffix=f"n{number}")["id"] for _ in range(5)]
        running, next_one, *waiting = ids
        rig.claim(running)
        ask = ClaimRequest(worker_id="w2", device="cuda:0", device_total_bytes=GIB)
        ends = Finish(
            worker_id="w1", attempt=1, outcome=Outcome.SUCCEEDED, base_model="base", adapter_path="adapter"
        )
        works: list[Any] = [
            lambda job_id=running, end=ends: rig.parts.attempts.finish(job_id, end),
            lambda job_id=next_one, ask=ask: rig.parts.attempts.claim(job_id, ask),
            *(lambda job_id=job_id: rig.parts.jobs.cancel(job_id) for job_id in waiting[:2]),
            lambda job_id=waiting[2]: rig.parts.jobs.pause(job_id),
        ]
        refusals = [result for result in at_once(works) if isinstance(result, SageError)]
        # The claim may come before the end.
        assert all(isinstance(refusal, NotYoursError) for refusal in refusals), refusals
        assert [rig.job(job_id)["status"] for job_id in (running, *waiting)] == [
            "succeeded", "cancelled", "cancelled", "paused",
        ]  # fmt: skip
        if rig.job(next_one)["status"] == "running":
            rig.finish(next_one, worker="w2")


@pytest.mark.parametrize("end", [Rig.finish, lambda rig, _: rig.parts.sweeper.take_back()])
def test_the_end_of_a_run_wakes_the_next_while_the_one_between_is_being_cancelled(
    end: Callable[[Rig, str], Any], rig: Rig
) -> None:
    running, between, last = [rig.create_job()["id"] for _ in range(3)]
    rig.claim(running)
    rig.parts.jobs.pause(running)
    # Its lease has run out, and those that wait have just been rung for.
    rig.clock.advance(3600)
    rig.parts.sweeper.ring_due()
    database = rig.parts.database
    calls = [
        threading.Thread(target=rig.parts.jobs.cancel, args=(between,)),
        threading.Thread(target=end, args=(rig, running)),
    ]
    with database.write() as session:
        # Nobody can write an event, and so neither call gets to its commit.
        session.execute(text("LOCK TABLE job_events IN SHARE MODE"))
        for number, call in enumerate(calls, 1):
            call.start()
            until_waiting(database, number)
    for call in calls:
        call.join(30)
    assert rig.job(between)["status"] == "cancelled"
    assert rig.job(running)["status"] in ("succeeded", "paused")
    with database.read() as session:
        assert [job.id for job in jobs.to_ring(session, rig.clock(), most=9)] == [last]


def until_waiting(database: Database, number: int) -> None:
    """Until so many transactions wait for a lock."""
    deadline = time.monotonic() + 30
    waiting = 0
    while waiting < number:
        assert time.monotonic() < deadline
        with database.read() as session:
            waiting = session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")) or 0


def test_a_deadlock_is_told_without_what_the_server_says_of_its_processes(rig: Rig) -> None:
    database, together = rig.parts.database, threading.Barrier(2)

    def lock(first: str, second: str) -> None:
        with database.write() as session:
            session.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
            models.lock_name(session, first)
            together.wait(10)
            models.lock_name(session, second)

    with database.write() as session:
        for name in "ab":
            models.lock_name(session, name)
    results = at_once([lambda: lock("a", "b"), lambda: lock("b", "a")])
    (refusal,) = [result for result in results if result is not None]
    assert isinstance(refusal, ServiceUnavailableError)
    assert (refusal.message, refusal.retry_after_s) == (
        "The database is busy (deadlock detected): try again.", 1,
    )  # fmt: skip


def test_a_device_is_never_promised_twice(rig: Rig) -> None:
    ids = [rig.create_job(suffix=f"n{number}")["id"] for number in range(5)]
    ask = ClaimRequest(worker_id="w", device="cpu", device_total_bytes=8 * GIB)
    # 40 % of the machine each: two fit, however they race.
    results = at_once([lambda job_id=job_id: rig.parts.attempts.claim(job_id, ask) for job_id in ids])
    assert sum(isinstance(result, SageError) for result in results) == 3
    (device,) = rig.get("/v1/sage/devices")["data"]
    assert device["leased_bytes"] <= device["total_bytes"]


def test_devices_models_and_merges(rig: Rig) -> None:
    rig.lease("engine:a", 6 * GIB, is_idle=True)
    job_id = rig.create_job()["id"]
    rig.claim(job_id, status=503)
    assert rig.lease("engine:a", 6 * GIB, is_idle=True)["must_yield"] is True
    rig.http.post("/internal/devices/release", json={"holder": "engine:a"})
    rig.claim(job_id)
    rig.finish(job_id)
    merge_id = rig.post("/v1/sage/models/code/merge")["id"]
    rig.post(f"/internal/merges/{merge_id}/claim", {"worker_id": "m"})
    end = {"worker_id": "m", "attempt": 1, "outcome": "succeeded", "merged_path": "x"}
    assert rig.post(f"/internal/merges/{merge_id}/finish", end)["status"] == "succeeded"
    beat = {"worker_id": "w1", "kind": "trainer"}
    assert rig.http.post("/internal/workers/beat", json=beat).status_code == 204
    assert rig.http.delete("/v1/models/code").status_code == 200


def test_parts_that_come_together_share_the_room_and_make_one_file(postgres: str, rig: Rig) -> None:
    upload_id = begin(rig, 9)["id"]
    first = send(rig, upload_id, b"abc")["id"]
    pieces = [b"abc", b"def", b"ghi", b"jkl", b"mno"]

    def post(data: bytes) -> Any:
        path = f"/v1/uploads/{upload_id}/parts"
        return rig.http.post(path, files={"data": ("\x00upload", data)})

    answers = [post(pieces[0]), *at_once([lambda data=data: post(data) for data in pieces[1:]])]
    kept_ids = [answer.json()["id"] for answer in answers if answer.status_code == 200]
    assert (len(kept_ids), kept_ids[0]) == (3, first)
    # Another process, as after a restart.
    with open_rig(rig.home, database_url=postgres) as again:
        ask = CompleteUploadRequest(part_ids=kept_ids)
        ends = at_once([lambda: again.parts.uploads.complete(upload_id, ask)] * 3)
        assert ends == [ends[0]] * 3
        (file,) = again.get("/v1/files")["data"]
        assert kept(rig.home) == [f"{file['id']}.jsonl"]


def test_a_nul_is_no_reason_to_break_off(rig: Rig) -> None:
    broken = []
    for path, methods in rig.app.openapi()["paths"].items():
        url = re.sub(r"\{[^}]*\}", "a%00b", path) + "?after=a%00b&model=a%00b"
        for method in methods:
            status = rig.http.request(method, url, json={} if method == "post" else None).status_code
            broken += [(method, url, status)] if status >= 500 else []
    assert not broken
    rig.post("/v1/fine_tuning/jobs", {"model": "smollm2-135m", "training_file": "a\0b"}, status=404)
    job_id = rig.create_job(metadata={"note": "a\0b"})["id"]
    rig.claim(job_id)
    rig.finish(job_id, "failed", error_code="training_failed", error_message="a\0b")
    assert rig.job(job_id)["error"]["message"] == "a\0b"


def test_an_upload_expires(rig: Rig) -> None:
    upload_id = begin(rig, 9)["id"]
    send(rig, upload_id, b"abc")
    rig.clock.advance(3600)
    rig.parts.uploads.delete_expired()
    assert "is expired" in cancel(rig, upload_id, status=409)["error"]["message"]
    assert kept(rig.home) == []


def test_a_walk_through_the_state_machine(postgres: str, rig: Rig, tmp_path: Path) -> None:
    run_job_machine(postgres, examples=10)
