"""How often a watcher looks, how long it waits for a stack that is restarted, and for what it does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sage_cli.client import Client
from sage_cli.jobs.follow import Pace, patiently
from sage_cli.jobs.merge import await_end
from sage_contracts.errors import NotFoundError, SageError, ServiceUnavailableError, UpstreamError
from sage_contracts.models import MergeJob, MergeStatus

AWAY = ServiceUnavailableError("orchestrator at http://127.0.0.1:8081 cannot be reached.")


@dataclass
class Hours:
    """A clock that only pauses move."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def answer_after(*errors: SageError, clock: Hours) -> str:
    left = list(errors)

    def ask() -> str:
        if left:
            raise left.pop(0)
        return "answer"

    return patiently(ask, clock=clock, pause=clock.pause)


def test_who_is_silent_is_asked_less_and_less_often_until_there_is_news() -> None:
    pauses: list[float] = []
    pace = Pace(pauses.append)
    for has_news in (False, False, False, False, False, True, False):
        pace.wait(has_news=has_news)
    assert pauses == [0.3, 0.6, 1.2, 2.0, 2.0, 0.3, 0.6]


def test_a_restart_that_cuts_an_answer_off_is_waited_for() -> None:
    """The gateway tells a part that cannot be reached from one that broke off before it answered."""
    away, cut = ServiceUnavailableError("cannot be reached"), UpstreamError("broke off before it answered")
    assert answer_after(away, cut, away, clock=Hours()) == "answer"


def test_who_is_away_for_a_minute_is_no_longer_waited_for() -> None:
    clock = Hours()
    with pytest.raises(ServiceUnavailableError, match="cannot be reached"):
        answer_after(*[ServiceUnavailableError("cannot be reached")] * 1000, clock=clock)
    assert 60 <= clock.now < 61


def test_what_will_not_pass_is_told_at_once() -> None:
    clock = Hours()
    with pytest.raises(NotFoundError):
        answer_after(NotFoundError("no such job"), clock=clock)
    assert clock.now == 0


class Answers(Client):
    """Says these of a merge, one a question, and the last for good."""

    def __init__(self, *answers: MergeJob | SageError) -> None:
        super().__init__("http://127.0.0.1:9")
        self._left = list(answers)

    def merge_job(self, merge_id: str) -> MergeJob:
        answer = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        if isinstance(answer, SageError):
            raise answer
        return answer


def merge_that_is(status: MergeStatus) -> MergeJob:
    return MergeJob(id="merge-7", model="code@1", status=status, created_at=0)


def test_a_merge_is_waited_for_through_a_restart_of_the_stack() -> None:
    clock, running = Hours(), merge_that_is(MergeStatus.RUNNING)
    with Answers(running, AWAY, AWAY, merge_that_is(MergeStatus.SUCCEEDED)) as client:
        ended = await_end(client, running, 1800, clock=clock, pause=clock.pause)
    assert ended.status is MergeStatus.SUCCEEDED


def test_a_merge_that_nobody_tells_of_any_more_is_named() -> None:
    clock = Hours()
    with Answers(AWAY) as client, pytest.raises(ServiceUnavailableError, match=r"cannot be reached.*merge-7"):
        await_end(client, merge_that_is(MergeStatus.QUEUED), 1800, clock=clock, pause=clock.pause)
    assert 60 <= clock.now < 62
