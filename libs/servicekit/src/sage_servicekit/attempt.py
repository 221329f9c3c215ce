"""One piece of work, from the doorbell to the finish: claim it, run its child, pass on the news, say the end.

What trainer and merger share. What the work is, and how its news and its end are worded, is theirs: each
subclasses `Runner` and `Attempt`.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from sage_contracts.errors import (
    NotFoundError,
    NotYoursError,
    SageError,
    StorageFullError,
    TrainingFailedError,
)
from sage_contracts.home import write_whole
from sage_contracts.workers import ClaimRequest, MergeClaim, Outcome, TrainClaim
from sage_servicekit.children import Child, begin_log, tail
from sage_servicekit.machine import Device
from sage_servicekit.settings import WorkerSettings
from sage_servicekit.worker import OrchestratorLink, claim, until_accepted

logger = logging.getLogger(__name__)

Claim = TypeVar("Claim", bound=TrainClaim | MergeClaim)
Message = TypeVar("Message")

_WAKE_S = 0.25
"""The longest the loop sleeps, so that SIGTERM to the worker is passed on at once."""


@dataclass(frozen=True)
class Post:
    """Where a worker stands: what every attempt of it needs."""

    settings: WorkerSettings
    link: OrchestratorLink
    worker_id: str
    device: Device
    stopping: threading.Event


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    outcome: Outcome
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None


@dataclass(frozen=True)
class ChildEnd:
    """How one child of an attempt ended."""

    exit_code: int
    was_killed: bool
    """By us, since it did not stop in time."""


class Runner(ABC, Generic[Claim]):
    """Answers doorbells, one at a time."""

    noun: str
    """What is rung for, for people and in the orchestrator's routes: `job` or `merge`."""
    claim_type: type[Claim]

    def __init__(self, post: Post) -> None:
        self._post = post
        self.current: str | None = None
        """The id of what is being done."""

    def run(self, work_id: str) -> None:
        """Do it if it can be claimed; return when the attempt is over or not ours."""
        post = self._post
        claimed = claim(
            post.link,
            f"/internal/{self.noun}s/{work_id}/claim",
            ClaimRequest(
                worker_id=post.worker_id,
                device=post.device.name,
                device_total_bytes=post.device.total_bytes,
                claim_id=secrets.token_hex(8),
            ),
            self.claim_type,
            stopping=post.stopping,
            patience_s=post.settings.claim_patience_s,
        )
        if claimed is None:
            return
        what = f"{claimed.name}@{claimed.version}"
        logger.info("%s %s: attempt %d of %s", self.noun, work_id, claimed.attempt, what)
        self.current = work_id
        try:
            self._attempt(claimed)
        finally:
            self.current = None

    @abstractmethod
    def _attempt(self, claimed: Claim) -> None:
        """Run an attempt of what was claimed."""


class Attempt(ABC, Generic[Claim, Message]):
    """One claimed attempt. Everything happens in `run`, in one thread."""

    worker: str
    """`trainer` or `merger`, for people."""
    noun: str
    """As of the runner."""
    verb: str
    """`train` or `merge`: names the child's log and its spec."""
    messages: TypeAdapter[Message]
    """What the child says, a line each."""

    def __init__(self, post: Post, claimed: Claim, work_id: str, *, stop_grace_s: float) -> None:
        """`stop_grace_s`: how long a child that is told to stop may take before it is killed."""
        self._post = post
        self._claim = claimed
        self._work_id = work_id
        self._path = f"/internal/{self.noun}s/{work_id}"
        self._stop_grace_s = stop_grace_s
        self._is_lost = False
        self._is_heard = True
        self._log_path = post.settings.home.resolve(claimed.output_dir) / "logs" / f"{self.verb}.log"
        self._log_start = 0
        self._interval_s = min(post.settings.report_interval_s, claimed.lease_s / 3)
        self._next_report_at = 0.0

    @abstractmethod
    def _work(self) -> Ending:
        """Do the work in one child (`_run_child`) or more, one after another."""

    @abstractmethod
    def _spawn(self, spec_path: Path) -> Child:
        """A child that works on the spec in this file. Raises: OSError."""

    @abstractmethod
    def _take_in(self, message: Message) -> None:
        """Remember what the child said, for the next report or the end."""

    @property
    @abstractmethod
    def _is_urgent(self) -> bool:
        """Whether there is news that people wait for, and that no report has carried yet."""

    @abstractmethod
    def _send_news(self) -> Outcome | None:
        """One report: it renews the lease, with news or without. Raises: SageError.

        Returns how the orchestrator wants the attempt to end at once; None: it may go on.
        """

    @abstractmethod
    def _finish_of(self, ending: Ending) -> BaseModel:
        """The last message about this attempt."""

    def run(self) -> None:
        """Spawn, pump, reap, finish: whatever happens between, the child is gone and the end is told."""
        try:
            ending = self._work()
        except Exception as error:
            logger.exception("%s %s: the attempt broke", self.noun, self._work_id)
            message = f"The {self.worker} could not run the {self.noun}: {error!r}"
            if isinstance(error, OSError):
                ending = self._broken_by(error, f"{message}.")
            else:
                ending = Ending(Outcome.FAILED, TrainingFailedError.code, message)
        if self._is_lost:
            return
        logger.info("%s %s: %s %s", self.noun, self._work_id, ending.outcome.value, ending.error_code or "")
        self._finish(ending)

    def _broken_by(self, error: OSError, message: str) -> Ending:
        """How the attempt ends when the system refuses its worker what it needs."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Ending(Outcome.FAILED, StorageFullError.code, f"{message} Free some space.")
        return Ending(Outcome.FAILED, TrainingFailedError.code, message)

    def _run_child(self, spec: BaseModel) -> ChildEnd:
        """Spawn a child on this spec, and pump until it is dead. Raises: OSError."""
        name = f"{self.verb}-{self._work_id}"
        spec_path = self._post.settings.home.run / f"{name}-{self._claim.attempt}.json"
        write_whole(spec_path, spec.model_dump_json(indent=1))
        self._log_start = begin_log(self._log_path)
        try:
            with self._spawn(spec_path) as child:
                self._pump(child)
                exit_code = child.reap()
                while lines := child.receive(0):
                    self._hear(lines)
        finally:
            # With those of earlier attempts, whose workers were killed.
            for path in spec_path.parent.glob(f"{name}-*.json"):
                path.unlink(missing_ok=True)
        return ChildEnd(exit_code, child.was_killed)

    def _pump(self, child: Child) -> None:
        """Until the child is dead: pass its news on, its orders back."""
        while not child.has_ended():
            self._hear(child.receive(min(_WAKE_S, self._next_report_at - time.monotonic())))
            if self._post.stopping.is_set():
                self._stop(child, Outcome.RELEASED)
            if self._is_urgent or time.monotonic() >= self._next_report_at:
                self._report(child)

    def _hear(self, lines: list[bytes]) -> None:
        for line in lines:
            try:
                message = self.messages.validate_json(line)
            except ValidationError:
                logger.warning("the child said what is no message of ours: %.200r", line)
                continue
            self._take_in(message)

    def _report(self, child: Child) -> None:
        """Send the news and obey the reply. What does not arrive is kept and sent again."""
        try:
            ordered = self._send_news()
        except SageError as error:
            self._not_accepted(error, child)
        else:
            self._is_heard = True
            if ordered is not None:
                self._stop(child, ordered)
        self._next_report_at = time.monotonic() + self._interval_s

    def _not_accepted(self, error: SageError, child: Child) -> None:
        if isinstance(error, NotYoursError | NotFoundError):
            # Somebody else may be writing the same folder already: no grace, no finish.
            logger.warning("%s %s is not ours any more, its child dies: %s", self.noun, self._work_id, error)
            self._is_lost = True
            child.kill()
        else:
            # Even when the lease must have expired: until somebody says otherwise the work is ours.
            if self._is_heard:
                logger.warning("the work goes on, its news is kept: %s", error)
            self._is_heard = False

    def _stop(self, child: Child, outcome: Outcome) -> None:
        """Let the child end for this reason, in its grace. Asked again and again while the reason holds."""
        child.stop(self._stop_grace_s)

    def _finish(self, ending: Ending) -> bool:
        """Whether the orchestrator knows of the end."""
        finish = self._finish_of(ending)
        return self._deliver(
            lambda: self._post.link.tell(f"{self._path}/finish", finish), f"the finish of {self._work_id}"
        )

    def _deliver(self, send: Callable[[], object], what: str) -> bool:
        """Whether the orchestrator took it in the end."""
        return until_accepted(
            send, what, stopping=self._post.stopping, patience_s=self._post.settings.finish_patience_s
        )

    def _log_tail(self) -> str:
        """The last lines of the last child."""
        return tail(self._log_path, since_byte=self._log_start)

    def _with_log(self, message: str) -> str:
        last_lines = self._log_tail()
        where = self._post.settings.home.relative(self._log_path)
        return f"{message}\nLast lines of {where}:\n{last_lines}" if last_lines else message
