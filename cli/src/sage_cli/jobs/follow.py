"""Following a job: its events, each once, and its state, until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar

from sage_cli.client import Client
from sage_cli.jobs.views import TRAINING
from sage_contracts.errors import SageError
from sage_contracts.jobs import EventType, FineTuningJob, JobEvent, JobMetrics, JobStatus
from sage_contracts.paging import ListPage

Answer = TypeVar("Answer")

_POLL_S = 0.3
# A trainer reports every 2 s: who asks more often for what is silent sees nothing more.
_LONGEST_POLL_S = 2.0
# The most events that the server gives at once.
_PAGE = 1000
# The stack may be restarted while somebody watches.
_OUTAGE_LIMIT_S = 60.0


class JobView(Protocol):
    """Shows a job to a person."""

    def event(self, event: JobEvent) -> None: ...

    def progress(self, job: FineTuningJob) -> None:
        """May be told the same twice."""
        ...


class Pace:
    """Pauses between looks at work under way: short after news, and longer the longer there is none."""

    def __init__(self, pause: Callable[[float], None] = time.sleep) -> None:
        self._pause = pause
        self._next_s = _POLL_S

    def wait(self, *, has_news: bool) -> None:
        if has_news:
            self._next_s = _POLL_S
        self._pause(self._next_s)
        self._next_s = min(2 * self._next_s, _LONGEST_POLL_S)


class EventFeed:
    """The events of one job, oldest first, each once; with or without the figures of every step."""

    def __init__(self, client: Client, job_id: str, *, with_metrics: bool) -> None:
        self._client = client
        self._job_id = job_id
        self._kind: EventType | None = None if with_metrics else "message"
        self._last_id: str | None = None

    def new(self) -> Iterator[JobEvent]:
        """Those that came since the last call, page by page as they are read. Raises: as `patiently`."""
        has_more = True
        while has_more:
            page = patiently(self._next_page)
            self._last_id, has_more = page.last_id or self._last_id, page.has_more
            yield from page.data

    def _next_page(self) -> ListPage[JobEvent]:
        return self._client.events_page(self._job_id, after=self._last_id, limit=_PAGE, kind=self._kind)


def follow(
    client: Client, job_id: str, view: JobView, *, with_metrics: bool = False, pace: Pace | None = None
) -> FineTuningJob:
    """Show the job until it ends or is paused. Raises: as `patiently`.

    A run may take days, so there is no deadline for the job itself; Ctrl-C leaves without stopping it.
    """
    feed = EventFeed(client, job_id, with_metrics=with_metrics)
    pace = pace or Pace()
    seen = JobMetrics()
    while True:
        # The state first: events that came before it ended are then surely in the list.
        job = patiently(partial(client.job, job_id))
        has_news, seen = job.sage.metrics != seen, job.sage.metrics
        if seen.phase != TRAINING:
            view.progress(job)  # the last step came before the news of what follows training
        for event in feed.new():
            view.event(event)
            has_news = True
        view.progress(job)
        if job.status.is_terminal or job.status is JobStatus.PAUSED:
            return job
        pace.wait(has_news=has_news)


def patiently(
    ask: Callable[[], Answer],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Answer:
    """The answer, however often the stack is restarted meanwhile, be it in the middle of an answer.

    Raises: the last error after a minute without an answer; what trying again would not help, at once.
    """
    silent_since: float | None = None
    while True:
        try:
            return ask()
        except SageError as error:
            silent_since = clock() if silent_since is None else silent_since
            if not error.retryable or clock() - silent_since > _OUTAGE_LIMIT_S:
                raise
            pause(_POLL_S)
