"""Jobs and sweeps by their names, however many there are of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from sage_cli.client import PAGE, Client
from sage_contracts.jobs import CreateJobRequest, FineTuningJob, SageJobOptions
from sage_contracts.sweeps import CreateSweepRequest

Sage = Callable[..., Any]


def queue(client: Client, name: str) -> FineTuningJob:
    return client.create_job(CreateJobRequest(model="auto", sage=SageJobOptions(name=name, task="code")))


@pytest.fixture
def oldest(gateway: str) -> FineTuningJob:
    """Of more jobs than a page of a list has, each with a name of its own."""
    with Client(gateway) as client:
        first = queue(client, "mine")
        for number in range(PAGE + 10):
            queue(client, f"other{number}")
    return first


def test_the_oldest_of_many_jobs_is_found_and_steered_by_its_name(
    online: Sage, oldest: FineTuningJob
) -> None:
    for words, told in (
        (("show", "mine"), f"{oldest.id}  mine"),
        (("pause", "mine"), f"{oldest.id} is paused"),
        (("resume", "mine"), f"{oldest.id} is queued again"),
        (("cancel", "mine"), f"{oldest.id} is cancelled"),
    ):
        ran = online("finetune", *words)
        assert told in ran.output
        assert ran.exit_code == 0


@pytest.mark.usefixtures("oldest")
def test_a_name_without_a_job_is_told_a_few_that_have_one(online: Sage) -> None:
    ran = online("finetune", "show", "nobody")
    assert ran.exit_code == 2
    assert "Names that have jobs: other109, other108, " in ran.stderr
    assert "other100 and others" in " ".join(ran.stderr.split())
    assert "other99" not in ran.stderr


@pytest.mark.usefixtures("oldest")
def test_a_list_may_be_longer_than_a_page(online: Sage) -> None:
    for limit, shown in ((5, 5), (PAGE + 1, PAGE + 1), (1000, PAGE + 11)):
        listed = json.loads(online("finetune", "list", "--limit", str(limit), "--json").stdout)
        assert len({job["id"] for job in listed}) == shown
    assert listed[-1]["sage"]["name"] == "mine"


def test_a_version_is_found_among_the_jobs_of_its_name(online: Sage, gateway: str) -> None:
    with Client(gateway) as client:
        first = queue(client, "mine")
        while not client.job(first.id).status.is_terminal:
            pass
        second = queue(client, "mine")
    assert online("finetune", "show", "mine@1").output.startswith(first.id)
    assert online("finetune", "show", "mine").output.startswith(second.id)


def test_the_oldest_of_many_sweeps_is_found_by_its_name(online: Sage, gateway: str) -> None:
    with Client(gateway) as client:
        for name in ("mine", *(f"other{number}" for number in range(25))):
            options = SageJobOptions(name=name, task="code")
            client.create_sweep(CreateSweepRequest(model="auto", sage=options, grid={"lora.r": [4]}))
    ran = online("finetune", "sweep", "show", "mine")
    assert (ran.exit_code, ran.output.split()[1]) == (0, "mine")
    ran = online("finetune", "sweep", "show", "nobody")
    assert ran.exit_code == 2
    assert "There are: other24, " in ran.stderr
    assert "other15 and others." in " ".join(ran.stderr.split())
