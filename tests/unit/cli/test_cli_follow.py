"""How long a watcher waits for a stack that is restarted, and what it does not wait for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sage_cli.jobs.follow import patiently
from sage_contracts.errors import NotFoundError, SageError, ServiceUnavailableError, UpstreamError


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
