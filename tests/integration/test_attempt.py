"""An attempt is told from beginning to end, whatever its child, the orchestrator or the disk do."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import BaseModel, TypeAdapter

from sage_contracts.errors import (
    ConflictError,
    DeviceBusyError,
    NotFoundError,
    NotYoursError,
    SageError,
    ServiceUnavailableError,
)
from sage_contracts.workers import ClaimRequest, MergeClaim, Outcome
from sage_servicekit.attempt import Attempt, ChildEnd, Ending, Post, Runner
from sage_servicekit.children import Child
from sage_servicekit.machine import Device
from sage_servicekit.settings import WorkerSettings
from sage_servicekit.worker import OrchestratorLink

CLAIM = MergeClaim(
    merge_id="errand-1",
    attempt=3,
    lease_s=30_000,
    name="code",
    version=1,
    base_model="base",
    adapter_path="adapter",
    output_dir="finetune_output/code",
)
# The alarm ends a child that nobody stops, so that a test fails and does not hang.
BEGIN = "import signal, sys; signal.alarm(20); say = lambda text: print(f'\"{text}\"', flush=True);"
OBEDIENT = BEGIN + "signal.signal(15, lambda *_: sys.exit(0)); say('ready!'); signal.pause()"
DEAF = BEGIN + "signal.signal(15, signal.SIG_IGN); say('ready!'); signal.pause()"


class Note(BaseModel):
    text: str


class RecordingLink(OrchestratorLink):
    """Keeps what it is told; `refusal` decides what is not taken."""

    def __init__(self, refusal: Callable[[str], SageError | None] = lambda path: None) -> None:
        super().__init__(WorkerSettings(home_dir=Path("/nowhere")))
        self.told: list[tuple[str, str]] = []
        self._refusal = refusal

    def _send(self, path: str, message: BaseModel) -> bytes:
        if (error := self._refusal(path)) is not None:
            raise error
        if path.endswith("/claim"):
            return CLAIM.model_dump_json().encode()
        assert isinstance(message, Note)
        self.told.append((path.rsplit("/", 1)[1], message.text))
        return b"{}"

    @property
    def finishes(self) -> list[str]:
        return [text for kind, text in self.told if kind == "finish"]


class Errand(Attempt[MergeClaim, str]):
    """Runs a line of Python. What it says is news, and urgent with an exclamation mark."""

    worker = "errander"
    noun = "errand"
    verb = "run"
    messages = TypeAdapter(str)

    def __init__(
        self, post: Post, code: str, *, wish: Outcome | None = None, stop_grace_s: float = 30
    ) -> None:
        super().__init__(post, CLAIM, CLAIM.merge_id, stop_grace_s=stop_grace_s)
        self.code = code
        self.wish = wish
        self.news: list[str] = []
        self.heard: list[str] = []
        self.reasons: set[Outcome] = set()
        self.end: ChildEnd | None = None

    def _work(self) -> Ending:
        self.end = self._run_child(Note(text="the spec"))
        return Ending(Outcome.SUCCEEDED, error_message=self._with_log("it ended"))

    def _spawn(self, spec_path: Path) -> Child:
        command = [sys.executable, "-c", self.code, str(spec_path)]
        return Child(command, log_path=self._log_path, env=os.environ)

    def _take_in(self, message: str) -> None:
        self.heard.append(message)
        self.news.append(message)

    @property
    def _is_urgent(self) -> bool:
        return any(text.endswith("!") for text in self.news)

    def _send_news(self) -> Outcome | None:
        news, self.news = self.news, []
        self._post.link.tell(f"{self._path}/events", Note(text=" ".join(news)))
        return self.wish if self.heard else None

    def _stop(self, child: Child, outcome: Outcome) -> None:
        self.reasons.add(outcome)
        super()._stop(child, outcome)

    def _finish_of(self, ending: Ending) -> Note:
        return Note(text=f"{ending.outcome.value} {ending.error_code}: {ending.error_message}")


@dataclass
class Stand:
    """One worker's post, with an orchestrator that keeps what it hears."""

    home: Path
    link: RecordingLink = field(default_factory=RecordingLink)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def post(self) -> Post:
        # So long an interval that the first report and urgent ones are all there are.
        settings = WorkerSettings(home_dir=self.home, report_interval_s=10_000, finish_patience_s=0)
        return Post(settings, self.link, "me", Device("cpu", 1), self.stopping)


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def test_all_that_a_child_said_is_heard_and_its_spec_is_gone_after_it(stand: Stand) -> None:
    code = (
        BEGIN
        + "say(open(sys.argv[1]).read().count('the spec')); print('noise'); [say(n) for n in range(500)]"
    )
    errand = Errand(stand.post, code)
    errand.run()
    assert errand.heard == ["1", *map(str, range(500))]
    assert errand.end == ChildEnd(0, was_killed=False)
    assert stand.link.finishes == ["succeeded None: it ended"]
    assert not list((stand.home / "run").iterdir())


def test_specs_of_attempts_whose_workers_were_killed_are_gone_after_it_too(stand: Stand) -> None:
    run = stand.home / "run"
    run.mkdir()
    for name in ("run-errand-1-1.json", "run-errand-1-2.json", "run-errand-12-1.json"):
        (run / name).write_text("{}")
    Errand(stand.post, BEGIN).run()
    assert [path.name for path in run.iterdir()] == ["run-errand-12-1.json"]


def test_what_a_child_said_with_its_last_breath_is_heard(stand: Stand) -> None:
    class Slow(Errand):
        """Takes so long over the first line that the child is dead before anybody listens again."""

        def _take_in(self, message: str) -> None:
            super()._take_in(message)
            if len(self.heard) == 1:
                os.kill(int(message), signal.SIGUSR1)
                os.waitid(os.P_PID, int(message), os.WEXITED | os.WNOWAIT)

    code = (
        f"{BEGIN} import os; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); say(os.getpid());"
        "signal.sigwait([signal.SIGUSR1]); say('last')"
    )
    errand = Slow(stand.post, code)
    errand.run()
    assert errand.heard[1:] == ["last"]


def test_the_words_of_an_end_carry_what_this_attempt_logged(stand: Stand) -> None:
    log = stand.home / "finetune_output/code/logs/run.log"
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier attempt\n")
    Errand(stand.post, "import sys; print('so it went', file=sys.stderr)").run()
    assert stand.link.finishes == [
        "succeeded None: it ended\nLast lines of finetune_output/code/logs/run.log:\nso it went"
    ]


def test_urgent_news_waits_for_no_interval_and_the_reply_is_obeyed(stand: Stand) -> None:
    errand = Errand(stand.post, OBEDIENT, wish=Outcome.PAUSED)
    errand.run()
    assert ("events", "ready!") in stand.link.told
    assert errand.reasons == {Outcome.PAUSED}
    assert errand.end == ChildEnd(0, was_killed=False)


def test_a_child_that_does_not_stop_in_its_grace_is_killed(stand: Stand) -> None:
    errand = Errand(stand.post, DEAF, wish=Outcome.CANCELLED, stop_grace_s=0.05)
    errand.run()
    assert errand.end == ChildEnd(-9, was_killed=True)
    assert len(stand.link.finishes) == 1


def test_a_worker_that_is_told_to_stop_stops_its_child(stand: Stand) -> None:
    class Leaving(Errand):
        def _take_in(self, message: str) -> None:
            super()._take_in(message)
            stand.stopping.set()

    errand = Leaving(stand.post, OBEDIENT)
    errand.run()
    assert errand.reasons == {Outcome.RELEASED}
    assert errand.end == ChildEnd(0, was_killed=False)


@pytest.mark.parametrize("error", [NotYoursError("somebody else's"), NotFoundError("deleted")])
def test_a_lost_attempt_dies_without_grace_and_says_nothing(tmp_path: Path, error: SageError) -> None:
    stand = Stand(tmp_path, RecordingLink(lambda path: error if path.endswith("/events") else None))
    errand = Errand(stand.post, DEAF)
    errand.run()
    assert errand.end == ChildEnd(-9, was_killed=True)
    assert stand.link.told == []


def test_work_goes_on_while_the_orchestrator_is_silent(tmp_path: Path) -> None:
    silence = ServiceUnavailableError("down")
    stand = Stand(tmp_path, RecordingLink(lambda path: silence if path.endswith("/events") else None))
    errand = Errand(stand.post, BEGIN + "say('one!'); say('two!')")
    errand.run()
    assert errand.heard == ["one!", "two!"]
    assert [kind for kind, _ in stand.link.told] == ["finish"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "insufficient_storage"),
        (errno.EDQUOT, "insufficient_storage"),
        (errno.ENOENT, "training_failed"),
    ],
)
def test_what_breaks_the_attempt_itself_is_its_end(stand: Stand, number: int, code: str) -> None:
    class Unable(Errand):
        def _spawn(self, spec_path: Path) -> Child:
            raise OSError(number, os.strerror(number))

    Unable(stand.post, "").run()
    (finish,) = stand.link.finishes
    assert finish.startswith(f"failed {code}: The errander could not run the errand: ")
    assert not list((stand.home / "run").iterdir())


class Errands(Runner[MergeClaim]):
    noun = "errand"
    claim_type = MergeClaim

    def __init__(self, post: Post) -> None:
        super().__init__(post)
        self.done: list[tuple[MergeClaim, str | None]] = []

    def _attempt(self, claimed: MergeClaim) -> None:
        self.done.append((claimed, self.current))
        raise RuntimeError("even so the worker is free again")


def test_what_is_claimed_is_attempted_and_known_by_its_id_meanwhile(stand: Stand) -> None:
    runner = Errands(stand.post)
    with pytest.raises(RuntimeError):
        runner.run("errand-1")
    assert runner.done == [(CLAIM, "errand-1")]
    assert runner.current is None


def test_a_claim_without_a_reply_is_asked_for_again_under_the_same_id(stand: Stand) -> None:
    asked: list[ClaimRequest] = []

    class Losing(RecordingLink):
        """The first reply is lost on its way."""

        def _send(self, path: str, message: BaseModel) -> bytes:
            assert isinstance(message, ClaimRequest)
            asked.append(message)
            if len(asked) == 1:
                raise DeviceBusyError("no reply", retry_after_s=0.01)
            return super()._send(path, message)

    stand.link = Losing()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            Errands(stand.post).run("errand-1")
    ids = [request.claim_id for request in asked]
    assert ids[0] == ids[1] is not None
    assert ids[2] not in (None, ids[0])


def test_what_somebody_else_has_is_left_alone(tmp_path: Path) -> None:
    runner = Errands(Stand(tmp_path, RecordingLink(lambda path: ConflictError("taken"))).post)
    runner.run("errand-1")
    assert runner.done == []
