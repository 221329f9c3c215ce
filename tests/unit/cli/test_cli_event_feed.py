"""Reading a job's events, against the orchestrator itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.orchestrator_rig import Rig, open_rig

from sage_cli.client import Client
from sage_cli.jobs.follow import EventFeed
from sage_contracts.jobs import JobEvent
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
