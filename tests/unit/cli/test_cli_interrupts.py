"""Ctrl-C while a job is being queued: what the server has by then is named, or taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from sage_cli.client import Client
from sage_cli.jobs.start import start
from sage_cli.jobs.submit import CheckedWish, check
from sage_cli.jobs.sweep import submit_sweep
from sage_cli.jobs.wish import JobWish
from sage_contracts.jobs import CreateJobRequest, FineTuningJob, JobEvent
from sage_contracts.paging import ListPage
from sage_contracts.sweeps import CreateSweepRequest, Sweep

Requests = Callable[[str], list[dict[str, Any]]]
GRID: dict[str, list[Any]] = {"lora.r": [4, 8]}


class LeftAfterQueueing(Client):
    """Somebody presses Ctrl-C when the server has stored the job, before its answer is here."""

    def create_job(self, request: CreateJobRequest) -> FineTuningJob:
        super().create_job(request)
        raise KeyboardInterrupt

    def create_sweep(self, request: CreateSweepRequest) -> Sweep:
        super().create_sweep(request)
        raise KeyboardInterrupt


class LeftBeforeQueueing(Client):
    """The same while the server is still looking at the rows."""

    def create_job(self, request: CreateJobRequest) -> FineTuningJob:
        raise KeyboardInterrupt

    def create_sweep(self, request: CreateSweepRequest) -> Sweep:
        raise KeyboardInterrupt


class LeftWhileTold(Client):
    """The same while it is told how the job was set up."""

    def events_page(self, job_id: str, **_: Any) -> ListPage[JobEvent]:
        raise KeyboardInterrupt


@pytest.fixture(params=["own rows", "the task's rows"])
def wish(request: pytest.FixtureRequest, tmp_path: Path) -> CheckedWish:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    data = rows if request.param == "own rows" else None
    return check(JobWish("qa", data=data, name="mine"))


def leave(act: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What is told; the exit code has been looked at."""
    capsys.readouterr()
    with pytest.raises(typer.Exit) as left:
        act()
    assert left.value.exit_code == 130
    said = capsys.readouterr()
    return said.out + said.err


def test_a_job_that_was_queued_is_named(
    gateway: str, wish: CheckedWish, capsys: pytest.CaptureFixture[str]
) -> None:
    with LeftAfterQueueing(gateway) as client:
        told = leave(lambda: start(client, wish, is_watching=True), capsys)
        [job] = client.jobs(5)
        assert f"sage finetune cancel {job.id}" in told
        assert not wish.data or client.file(job.training_file)


def test_a_sweep_that_was_queued_is_named(
    gateway: str, wish: CheckedWish, capsys: pytest.CaptureFixture[str]
) -> None:
    with LeftAfterQueueing(gateway) as client:
        told = leave(lambda: submit_sweep(client, wish, GRID, 4), capsys)
        [sweep] = client.sweeps(5)
        assert f"sage finetune sweep cancel {sweep.id}" in told


def test_what_was_not_queued_leaves_nothing(
    gateway: str, wish: CheckedWish, requests: Requests, capsys: pytest.CaptureFixture[str]
) -> None:
    with LeftBeforeQueueing(gateway) as client:
        for act in (
            lambda: start(client, wish, is_watching=True),
            lambda: submit_sweep(client, wish, GRID, 4),
        ):
            assert "Interrupted; nothing was queued." in leave(act, capsys)
    files = [entry["method"] for entry in requests("/v1/files/file-1") + requests("/v1/files/file-2")]
    assert files == (["DELETE", "DELETE"] if wish.data else [])


def test_another_job_of_the_name_is_not_taken_for_it(
    gateway: str, wish: CheckedWish, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(gateway) as client:
        ended = client.create_job(CreateJobRequest(model="auto", sage=wish.options))
        client.act(ended.id, "cancel")
    with LeftBeforeQueueing(gateway) as client:
        told = leave(lambda: start(client, wish, is_watching=True), capsys)
    assert "nothing was queued" in told


def test_whoever_leaves_before_the_first_step_is_told_how_to_come_back(
    gateway: str, wish: CheckedWish, capsys: pytest.CaptureFixture[str]
) -> None:
    with LeftWhileTold(gateway) as client:
        told = leave(lambda: start(client, wish, is_watching=False), capsys)
        assert f"sage finetune watch {client.jobs(1)[0].id}" in told
