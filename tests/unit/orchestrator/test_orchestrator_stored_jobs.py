"""Jobs as another version may have stored them: read, and never trained as something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.orchestrator_rig import Rig, open_rig

from sage_orchestrator.jobs import repository as jobs

JOBS = "/v1/fine_tuning/jobs"


def store_config(rig: Rig, job_id: str, **changes: Any) -> None:
    """As another version of the orchestrator, or one with other plug-ins, might have stored the job."""
    with rig.parts.database.write() as session:
        row = jobs.get(session, job_id)
        row.config = {**row.config, **changes}
        row.task = row.config["task"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"removed_setting": 1}, "sage.config.removed_setting: Extra inputs"),
        ({"task": "sums"}, "sage.config.task: Input should be"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
    ],
)
def test_a_stored_job_that_cannot_be_read_is_shown_as_such_beside_the_others(
    rig: Rig, changes: dict[str, Any], said: str
) -> None:
    good, bad = rig.create_job(), rig.create_job(sage={"task": "code", "config": {"max_steps": 3}})
    store_config(rig, bad["id"], **changes)
    first, second = rig.get(JOBS)["data"]
    assert (first["id"], second) == (bad["id"], good)
    assert said in first["sage"]["unreadable"] and "create the job anew" in first["sage"]["unreadable"]
    assert rig.job(bad["id"]) == first
    assert rig.get(f"{JOBS}/{bad['id']}/events")["data"]


def test_a_stored_job_that_cannot_be_read_is_not_trained_as_something_else(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    store_config(rig, job_id, removed_setting=1)
    rig.claim(job_id, status=409)
    job = rig.job(job_id)
    assert job["status"] == "failed" and "removed_setting" in job["error"]["message"]
    assert job["sage"]["attempt"] == 0 and job["finished_at"] is not None
    assert rig.sweep() == []


def test_who_waits_behind_a_stored_job_that_cannot_be_read_is_rung_for(rig: Rig) -> None:
    first, unreadable, waiting = (rig.create_job()["id"] for _ in range(3))
    rig.claim(first)
    rig.sweep()
    for job_id in (unreadable, waiting):
        rig.claim(job_id, status=409)
    store_config(rig, unreadable, removed_setting=1)
    rig.finish(first)
    assert rig.sweep() == [unreadable]
    rig.claim(unreadable, status=409)
    assert rig.sweep() == [waiting]


def test_a_job_whose_settings_are_unknown_after_an_update_still_ends(rig: Rig) -> None:
    job_id = rig.create_job(sage={"task": "code", "config": {"lora": {"r": 24}}})["id"]
    rig.claim(job_id)
    store_config(rig, job_id, removed_setting=1)
    assert rig.finish(job_id)["fine_tuned_model"] == "code@1"
    assert rig.get("/internal/models/resolve", name="code")["max_lora_rank"] == 24


def test_a_job_that_was_stored_with_more_can_still_be_read(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    with rig.parts.database.write() as session:
        row = jobs.get(session, job_id)
        row.config = {**row.config, "sample_prompts": ["a"] * 100}
    assert len(rig.get(JOBS)["data"][0]["sage"]["config"]["sample_prompts"]) == 100


def test_a_job_that_was_stored_with_a_negative_seed_can_still_be_read(rig: Rig) -> None:
    job_id = rig.create_job()["id"]
    with rig.parts.database.write() as session:
        row = jobs.get(session, job_id)
        row.config = {**row.config, "seed": -1}
    assert rig.job(job_id)["seed"] == -1 == rig.get(JOBS)["data"][0]["seed"]


def test_the_stored_configuration_survives_a_restart(home: Path) -> None:
    with open_rig(home) as rig:
        job = rig.create_job(suffix="kept")
    with open_rig(home) as rig:
        assert json.dumps(rig.job(job["id"])) == json.dumps(job)
