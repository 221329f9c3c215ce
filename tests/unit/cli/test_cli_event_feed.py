"""Reading a job's events, against the orchestrator itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.orchestrator_rig import Rig, open_rig

from sage_cli.client import Client
from sage_cli.jobs.follow import EventFeed, Pace, follow
from sage_contracts.jobs import FineTuningJob, JobEvent, JobStatus
from sage_contracts.paging import ListPage

STEPS = 1500


class Counting(Client):
    """Counts the pages of events that it asked for."""

    pages = 0

    def events_page(self, job_id: str, **choice: Any) -> ListPage[JobEvent]:
        self.pages += 1
        return super().events_page(job_id, **choice)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    home: Path = tmp_path_factory.mktemp("orchestrator")
    with open_rig(home) as opened:
        yield opened


@pytest.fixture
def job_id(rig: Rig) -> str:
    """A running job that has told of many steps."""
    rig.reset()
    created: str = rig.create_job()["id"]
    rig.claim(created)
    rig.report(created, events=[event("metrics", f"Step {number}") for number in range(STEPS)])
    return created


@pytest.fixture(scope="module")
def url(rig: Rig) -> Iterator[str]:
    with serving(rig.app) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Counting]:
    with Counting(url) as opened:
        yield opened


def event(kind: str, message: str) -> dict[str, Any]:
    return {"created_at": 1.0, "message": message, "type": kind}


def texts(feed: EventFeed) -> list[str]:
    return [event.message for event in feed.new()]


def test_a_page_is_told_before_the_next_one_is_read(client: Counting, job_id: str) -> None:
    events = EventFeed(client, job_id, with_metrics=True).new()
    assert next(events).message.startswith("Created")
    assert client.pages == 1
    assert [event.message for event in events][-1] == f"Step {STEPS - 1}"
    assert client.pages == 2


def test_who_wants_messages_alone_reads_no_steps(client: Counting, job_id: str, rig: Rig) -> None:
    feed = EventFeed(client, job_id, with_metrics=False)
    told = texts(feed)
    assert told[-1].startswith("Started on w1")
    assert (told, client.pages) == (rig.messages(job_id)[: len(told)], 1)
    rig.report(job_id, events=[event("metrics", "Step 1500"), event("message", "Saved")])
    assert texts(feed) == ["Saved"]
    assert texts(feed) == []
    assert client.pages == 3


@dataclass
class Screen:
    """Keeps what it is told, in order; of the same figures the first."""

    lines: list[str] = field(default_factory=list)

    def event(self, event: JobEvent) -> None:
        self.lines.append(event.message)

    def progress(self, job: FineTuningJob) -> None:
        line = f"step {job.sage.metrics.step}"
        if job.sage.metrics.step and line not in self.lines:
            self.lines.append(line)


def trainer_at_work(rig: Rig, job_id: str, pauses: list[float]) -> Callable[[float], None]:
    """While the watcher pauses, the next thing happens: steps, silence, the end of training, the end."""

    def figures(phase: str, step: int) -> dict[str, Any]:
        return {"phase": phase, "step": step, "total_steps": 3}

    happens = iter(
        [
            lambda: rig.report(
                job_id, events=[event("message", "Training: 3 steps")], metrics=figures("training", 1)
            ),
            lambda: rig.report(job_id, metrics=figures("training", 1)),
            lambda: rig.report(job_id, metrics=figures("training", 1)),
            lambda: rig.report(job_id, metrics=figures("training", 2)),
            lambda: rig.report(
                job_id, events=[event("message", "Saving the weights")], metrics=figures("saving", 3)
            ),
            lambda: rig.finish(job_id),
        ]
    )

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        next(happens)()

    return pause


def test_a_run_is_watched_closely_while_it_steps_and_told_in_the_order_of_what_happened(
    client: Counting, rig: Rig
) -> None:
    rig.reset()
    job_id: str = rig.create_job()["id"]
    rig.claim(job_id)
    screen, pauses = Screen(), list[float]()
    job = follow(client, job_id, screen, pace=Pace(trainer_at_work(rig, job_id, pauses)))
    assert job.status is JobStatus.SUCCEEDED
    told = [line for line in screen.lines if line.startswith(("step", "Training:", "Saving"))]
    assert told == ["Training: 3 steps", "step 1", "step 2", "step 3", "Saving the weights"]
    assert pauses == [0.3, 0.3, 0.6, 1.2, 0.3, 0.3]
