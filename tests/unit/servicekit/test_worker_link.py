"""Claiming and delivering: what is asked again, and what is taken as an answer."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tests.fakes.small_disk import no_room_below

from sage_contracts.errors import (
    AuthenticationError,
    DeviceBusyError,
    InvalidRequestError,
    NotFoundError,
    NotYoursError,
    SageError,
    ServiceUnavailableError,
    StorageFullError,
)
from sage_contracts.workers import ClaimRequest, ReportReply, WorkerBeat
from sage_servicekit.settings import ServiceSettings
from sage_servicekit.worker import OrchestratorLink, SignOfLife, claim, until_accepted

REQUEST = ClaimRequest(worker_id="w")


class ScriptedLink(OrchestratorLink):
    """Answers with what it was given, in order; an error is raised."""

    def __init__(self, *answers: BaseModel | SageError) -> None:
        super().__init__(ServiceSettings(home_dir=Path("/nowhere")))
        self.answers = list(answers)
        self.asked = 0

    def _send(self, path: str, message: BaseModel) -> bytes:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, SageError):
            raise answer
        return answer.model_dump_json().encode()


def ask(link: OrchestratorLink, *, patience_s: float = 0, stopping: threading.Event | None = None) -> Any:
    return claim(
        link, "/claim", REQUEST, ReportReply, stopping=stopping or threading.Event(), patience_s=patience_s
    )


def test_a_claim_returns_what_it_got() -> None:
    assert ask(ScriptedLink(ReportReply(lease_s=5))).lease_s == 5


@pytest.mark.parametrize("error", [NotYoursError("taken"), NotFoundError("gone"), AuthenticationError("no")])
def test_a_refused_claim_is_not_asked_again(error: SageError) -> None:
    link = ScriptedLink(error)
    assert ask(link, patience_s=100) is None
    assert link.asked == 1


def test_a_busy_device_is_asked_for_after_the_time_it_names() -> None:
    link = ScriptedLink(DeviceBusyError("busy", retry_after_s=0.01), ReportReply(lease_s=5))
    assert ask(link, patience_s=1).lease_s == 5


def test_patience_ends() -> None:
    link = ScriptedLink(*[DeviceBusyError("busy", retry_after_s=0.01)] * 4)
    assert ask(link, patience_s=0.025) is None
    assert link.asked == 3


def test_a_worker_that_stops_asks_for_nothing() -> None:
    stopping = threading.Event()
    stopping.set()
    link = ScriptedLink()
    assert ask(link, stopping=stopping) is None
    assert link.asked == 0


def test_an_answer_that_is_none_of_ours_is_an_error_not_a_crash() -> None:
    assert ask(ScriptedLink(REQUEST)) is None


@pytest.mark.parametrize(
    ("answer", "arrived"),
    [
        (ReportReply(lease_s=1), True),
        (NotYoursError("late"), False),
        (InvalidRequestError("wrong"), False),
        (ServiceUnavailableError("down"), False),
        (SageError("bug"), False),
    ],
)
def test_delivering_ends(answer: BaseModel | SageError, arrived: bool) -> None:
    link = ScriptedLink(answer)
    sent = until_accepted(lambda: link.tell("/x", REQUEST), "it", stopping=threading.Event(), patience_s=0)
    assert sent is arrived
    assert link.asked == 1


@pytest.mark.parametrize(
    "error", [ServiceUnavailableError("down"), SageError("bug"), StorageFullError("full")]
)
def test_what_may_pass_is_waited_for(error: SageError) -> None:
    link = ScriptedLink(error, error, ReportReply(lease_s=1))
    assert until_accepted(
        lambda: link.tell("/x", REQUEST), "it", stopping=threading.Event(), patience_s=10, retry_s=0.001
    )
    assert link.asked == 3


def test_a_silent_orchestrator_is_named(tmp_path: Path) -> None:
    settings = ServiceSettings(home_dir=tmp_path, orchestrator_url="http://127.0.0.1:1/base/")
    with pytest.raises(ServiceUnavailableError, match=r"127\.0\.0\.1:1/base does not answer /x"):
        OrchestratorLink(settings, timeout_s=1).tell("/x", REQUEST)


def test_signs_of_life_show_once_the_orchestrator_has_heard_them_and_go_on_without_it(tmp_path: Path) -> None:
    alive = tmp_path / "run" / "trainer.alive"
    beaten = threading.Event()
    shown: list[bool] = []

    def beat() -> WorkerBeat:
        shown.append(alive.exists())
        if len(shown) == 8:
            beaten.set()
        return WorkerBeat(worker_id="w", kind="trainer")

    down = ServiceUnavailableError("down")
    link = ScriptedLink(down, down, REQUEST, *[down] * 1000)
    life = SignOfLife(ServiceSettings(home_dir=tmp_path), link, beat, interval_s=0.01)
    life.start()
    assert beaten.wait(10)
    life.stop()
    # The first is of its making; the orchestrator hears the fourth.
    assert shown[:8] == [False, False, False, False, True, True, True, True]
    assert not alive.exists()


def test_signs_of_life_go_on_where_there_is_no_room_to_show_them(tmp_path: Path) -> None:
    beats, enough = itertools.count(1), threading.Event()

    def beat() -> WorkerBeat:
        if next(beats) == 5:
            enough.set()
        return WorkerBeat(worker_id="w", kind="trainer")

    life = SignOfLife(
        ServiceSettings(home_dir=tmp_path), ScriptedLink(*[REQUEST] * 1000), beat, interval_s=0.01
    )
    with no_room_below(tmp_path):
        life.start()
        assert enough.wait(10)
        life.stop()


def test_the_last_sign_of_life_says_farewell(tmp_path: Path) -> None:
    told: list[WorkerBeat] = []
    heard = threading.Event()

    class Listening(OrchestratorLink):
        def _send(self, path: str, message: BaseModel) -> bytes:
            told.append(WorkerBeat.model_validate(message.model_dump()))
            heard.set()
            return b"{}"

    settings = ServiceSettings(home_dir=tmp_path)
    life = SignOfLife(settings, Listening(settings), lambda: WorkerBeat(worker_id="w", kind="merger"))
    life.start()
    assert heard.wait(10)
    life.stop()
    assert [beat.is_leaving for beat in told] == [False] * (len(told) - 1) + [True]
