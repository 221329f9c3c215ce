"""How often is rung for what waits: a busy worker needs few bells, and a broker has little room for them."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.orchestrator_rig import Rig

from sage_contracts.workers import MERGE_QUEUE, MERGE_TASK, TRAIN_QUEUE, TRAIN_TASK
from sage_orchestrator.doorbell import CeleryDoorbell
from sage_orchestrator.settings import OrchestratorSettings
from sage_servicekit.broker import MOST_WAITING, make_celery

JOBS = "/v1/fine_tuning/jobs"
CLAIM = {"worker_id": "w1", "device": "cpu", "device_total_bytes": 2**33}


def test_many_jobs_of_one_name_are_rung_for_one_after_the_other(rig: Rig) -> None:
    count, ended, longest = 40, 0, 0
    for _ in range(count):
        rig.create_job()
    queue = rig.sweep()
    while queue:
        longest = max(longest, len(queue))
        job_id = queue.pop(0)
        # As a worker does that hears the bells in their order.
        if rig.http.post(f"/internal/jobs/{job_id}/claim", json=CLAIM).status_code == 200:
            rig.finish(job_id, "failed")
            ended += 1
            queue += rig.sweep()
    assert ended == count
    assert longest <= 2 * count


def test_where_the_next_of_a_name_is_taken_back_the_one_after_it_is_rung_for(rig: Rig) -> None:
    first, second, third, fourth = (rig.create_job()["id"] for _ in range(4))
    rig.sweep()
    rig.claim(first)
    rig.finish(first)
    assert rig.sweep() == [second]
    rig.post(f"{JOBS}/{second}/cancel")
    assert rig.sweep() == [third]
    rig.post(f"{JOBS}/{third}/pause")
    assert rig.sweep() == [fourth]


def test_what_found_no_room_is_rung_for_as_soon_as_there_is_some(rig: Rig) -> None:
    first = rig.create_job()["id"]
    assert rig.sweep() == [first]
    rig.bell.is_full = True
    second = rig.create_job(suffix="other")["id"]
    assert rig.sweep() == []
    rig.bell.is_full = False
    assert rig.sweep() == [second]
    rig.clock.advance(29)
    assert rig.sweep() == []


def test_of_many_that_wait_no_more_are_looked_at_than_find_room(rig: Rig) -> None:
    grid = {"max_steps": list(range(1, MOST_WAITING + 5))}
    body = {"model": "smollm2-135m", "sage": {"task": "code"}, "grid": grid, "max_jobs": MOST_WAITING + 5}
    ids = [child["job_id"] for child in rig.post("/v1/sage/sweeps", body)["children"]]
    with rig.statements() as asked:
        assert rig.sweep() == ids[:MOST_WAITING]
    # Nothing of what is only shown or trained.
    assert not any("jobs.config" in statement for statement in asked)
    assert rig.sweep() == ids[MOST_WAITING:]
    assert rig.sweep() == []


def test_a_queue_with_bells_enough_takes_no_more(tmp_path: Path) -> None:
    settings = OrchestratorSettings(home_dir=tmp_path, broker_url="memory://")
    bell = CeleryDoorbell(settings)
    told = [bell.ring(TRAIN_TASK, f"ftjob-{number}") for number in range(MOST_WAITING + 10)]
    assert told == [True] * MOST_WAITING + [False] * 10
    assert bell.ring(MERGE_TASK, "merge-1")

    with make_celery(settings).connection_for_read() as connection, connection.channel() as channel:
        waiting = {name: channel.queue_purge(name) for name in (TRAIN_QUEUE, MERGE_QUEUE)}
    assert waiting == {TRAIN_QUEUE: MOST_WAITING, MERGE_QUEUE: 1}
