"""OpenAI's hyperparameters on a job: the numbers that it is trained with, in place of "auto"."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update
from tests.fakes.orchestrator_rig import Rig

from sage_orchestrator.rows import JobRow

JOBS = "/v1/fine_tuning/jobs"


def shown(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    figures = job["hyperparameters"]
    kind = job["method"]["type"]
    assert figures.items() <= job["method"][kind]["hyperparameters"].items()
    return figures["n_epochs"], figures["batch_size"], figures["learning_rate_multiplier"]


def with_config(preset: str = "cpu", **fields: Any) -> dict[str, Any]:
    return {"sage": {"task": "code", "preset": preset, "config": fields}}


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        (with_config(), (1, 8, 1.0)),
        (with_config("rtx_3060"), (3, 16, 1.0)),
        (with_config(num_train_epochs=4, learning_rate=3e-4), (4, 8, 1.5)),
        (with_config(per_device_train_batch_size=2, gradient_accumulation_steps=3), (1, 6, 1.0)),
        ({**with_config(), "hyperparameters": {"batch_size": 4, "learning_rate_multiplier": 3}}, (1, 4, 3.0)),
        ({**with_config(), "method": {"type": "dpo"}}, (1, 8, 1.0)),
    ],
)
def test_what_was_left_to_the_preset_is_told_as_numbers(
    rig: Rig, fields: dict[str, Any], numbers: tuple[Any, ...]
) -> None:
    job = rig.create_job(**fields)
    assert shown(job) == numbers
    assert rig.job(job["id"]) == job and [shown(listed) for listed in rig.get(JOBS)["data"]] == [numbers]
    assert isinstance(job["hyperparameters"]["n_epochs"], int)


def test_what_openais_fields_cannot_hold_stays_auto(rig: Rig) -> None:
    job = rig.create_job(**with_config(num_train_epochs=0.5, gradient_accumulation_steps=100))
    assert shown(job) == ("auto", "auto", 1.0)


def test_of_a_config_that_cannot_be_read_no_numbers_are_told(rig: Rig) -> None:
    job_id = rig.create_job(hyperparameters={"n_epochs": 2})["id"]
    with rig.parts.database.write() as session:
        session.execute(update(JobRow).values(config={"num_train_epochs": "?"}))
    assert shown(rig.job(job_id)) == (2, "auto", "auto")
