"""One job, from the doorbell to the finish: claim it, spawn its child, pass on its news, say how it ended."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

from pydantic import ValidationError

from sage.tools.finetune.hardware import physical_cores
from sage_contracts.config import OomRung
from sage_contracts.errors import (
    InvalidRequestError,
    NotFoundError,
    NotYoursError,
    SageError,
    StorageFullError,
    TrainingFailedError,
)
from sage_contracts.home import write_whole
from sage_contracts.jobs import EventLevel, JobMetrics
from sage_contracts.workers import (
    CheckpointReport,
    ClaimRequest,
    EventReport,
    Finish,
    Order,
    Outcome,
    Report,
    ReportReply,
    TrainClaim,
)
from sage_servicekit.children import Child, tail
from sage_servicekit.machine import Device, oom_kill_count
from sage_servicekit.worker import OrchestratorLink, claim, until_accepted
from sage_trainer.child_deaths import ChildDeaths
from sage_trainer.ending import Ending, LastWords, ending_of, stronger_order
from sage_trainer.messages import (
    CHILD_MESSAGE,
    AnswerMessage,
    CheckpointMessage,
    ChildSpec,
    DoneMessage,
    EvalMessage,
    FailedMessage,
    LogMessage,
    PhaseMessage,
    ReadyMessage,
    StepMessage,
    StoppedMessage,
)
from sage_trainer.settings import TrainerSettings
from sage_trainer.spare import Spare
from sage_trainer.spool import Spool

logger = logging.getLogger(__name__)

_WAKE_S = 0.25
"""The longest the loop sleeps, so that SIGTERM to the worker is passed on at once."""


@dataclass(frozen=True)
class Post:
    """Where this worker stands: what every attempt of it needs."""

    settings: TrainerSettings
    link: OrchestratorLink
    worker_id: str
    device: Device
    stopping: threading.Event
    spare: Spare


def child_env(settings: TrainerSettings, device: str) -> dict[str, str]:
    """The environment of a training child."""
    env = {
        **os.environ,
        "SAGE_HOME": str(settings.home.root),
        # Unset, every library starts a thread per core of the host, and they spin against each other.
        "OMP_NUM_THREADS": str(settings.train_threads or physical_cores()),
        # Spinning while they wait costs others on a busy machine 3 to 5 times their time.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" not in env:
        env["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return env


class TrainRunner:
    """Answers doorbells, one at a time."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self.current_job: str | None = None

    def run(self, job_id: str) -> None:
        """Train the job if it can be claimed; return when the attempt is over or not ours."""
        post = self._post
        request = ClaimRequest(
            worker_id=post.worker_id, device=post.device.name, device_total_bytes=post.device.total_bytes
        )
        claimed = claim(
            post.link,
            f"/internal/jobs/{job_id}/claim",
            request,
            TrainClaim,
            stopping=post.stopping,
            patience_s=post.settings.claim_patience_s,
        )
        if claimed is None:
            return
        logger.info("job %s: attempt %d of %s@%d", job_id, claimed.attempt, claimed.name, claimed.version)
        self.current_job = job_id
        try:
            Attempt(post, claimed).run()
        finally:
            self.current_job = None
            post.spare.keep()


class Attempt:
    """One claimed attempt. Everything happens in `run`, in one thread."""

    def __init__(self, post: Post, claimed: TrainClaim) -> None:
        self._post = post
        self._claim = claimed
        self._path = f"/internal/jobs/{claimed.job_id}"
        self._spool = Spool(post.settings.spool_events)
        self._metrics = JobMetrics()
        self._ordered: Outcome | None = None
        self._words: LastWords | None = None
        self._is_lost = False
        self._is_heard = True
        self._log_path = post.settings.home.resolve(claimed.output_dir) / "logs" / "train.log"
        self._log_start = 0
        self._interval_s = min(post.settings.report_interval_s, claimed.lease_s / 3)
        self._next_report_at = 0.0

    def run(self) -> None:
        """Spawn, pump, reap, finish: whatever happens between, the child is gone and the end is told."""
        try:
            ending = self._train()
        except Exception as error:
            logger.exception("job %s: the attempt broke", self._claim.job_id)
            is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            code = StorageFullError.code if is_full else TrainingFailedError.code
            ending = Ending(Outcome.FAILED, code, f"The trainer could not run the job: {error!r}")
        if not self._is_lost:
            self._finish(ending)

    def _train(self) -> Ending:
        """One child after another, as long as they die for lack of memory and something can be changed."""
        checkpoints = self._log_path.parent.parent / "checkpoints"
        deaths = ChildDeaths(self._claim, checkpoints, self._post.device.name, oom_kill_count)
        rungs: Sequence[OomRung] = ()
        while True:
            deaths.begin()
            exit_code = self._train_child(rungs)
            ending = ending_of(self._ordered, self._words, exit_code, self._with_log)
            if self._words is not None or self._ordered is not None or self._is_lost:
                return ending
            after = deaths.after(exit_code, self._log_tail())
            if after is None:
                return ending
            if isinstance(after, Ending):
                return replace(after, error_message=self._with_log(after.error_message or ""))
            self._say(after.message, EventLevel.WARN, is_urgent=True)
            rungs = after.rungs

    def _train_child(self, rungs: Sequence[OomRung]) -> int:
        """Spawn a child that begins on these rungs, and pump until it is dead. Returns its exit code."""
        spec_path = self._post.settings.home.run / f"train-{self._claim.job_id}-{self._claim.attempt}.json"
        spec = ChildSpec(
            home=str(self._post.settings.home.root),
            device=self._post.device.name,
            claim=self._claim,
            rungs=list(rungs),
        )
        write_whole(spec_path, spec.model_dump_json(indent=1))
        self._log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
        try:
            with self._spawn(spec_path) as child:
                self._pump(child)
                exit_code = child.reap()
                while lines := child.receive(0):
                    for line in lines:
                        self._hear(line)
        finally:
            spec_path.unlink(missing_ok=True)
        if self._ordered is not None and child.was_killed:
            grace = f"{self._post.settings.stop_grace_s:.0f} s"
            self._say(f"The training process did not stop within {grace} and was killed", EventLevel.WARN)
        return exit_code

    def _spawn(self, spec_path: Path) -> Child:
        """The child that waits for a job, or a new one. Raises: OSError."""
        post = self._post
        if (ready := post.spare.take(spec_path, self._log_path)) is not None:
            return ready
        command = [*post.settings.train_child_command, str(spec_path)]
        return Child(command, log_path=self._log_path, env=child_env(post.settings, post.device.name))

    def _pump(self, child: Child) -> None:
        """Until the child is dead: pass its news on, its orders back."""
        while not child.has_ended():
            for line in child.receive(min(_WAKE_S, self._next_report_at - time.monotonic())):
                self._hear(line)
            if self._post.stopping.is_set():
                self._order(child, Outcome.RELEASED)
            if self._spool.is_urgent or time.monotonic() >= self._next_report_at:
                self._report(child)

    def _report(self, child: Child) -> None:
        """Send the news and obey the reply. What does not arrive is kept and sent again."""
        try:
            order = self._send_news()
        except SageError as error:
            self._not_accepted(error, child)
        else:
            self._is_heard = True
            if order is not Order.CONTINUE:
                self._order(child, Outcome.CANCELLED if order is Order.CANCEL else Outcome.PAUSED)
        self._next_report_at = time.monotonic() + self._interval_s

    def _send_news(self) -> Order:
        """Raises: SageError."""
        events, checkpoints = self._spool.batch()
        report = Report(
            worker_id=self._post.worker_id,
            attempt=self._claim.attempt,
            events=events,
            checkpoints=checkpoints,
            metrics=self._metrics,
        )
        reply = self._post.link.post(f"{self._path}/events", report, ReportReply)
        self._spool.sent()
        return reply.order

    def _not_accepted(self, error: SageError, child: Child) -> None:
        if isinstance(error, NotYoursError | NotFoundError):
            # Somebody else may be writing the same folder already: no grace, no finish.
            logger.warning("job %s is not ours any more, its child dies: %s", self._claim.job_id, error)
            self._is_lost = True
            child.kill()
        elif isinstance(error, InvalidRequestError):
            logger.error("a report that will never be accepted is dropped: %s", error)
            self._spool.sent()
        else:
            # Even when the lease must have expired: until somebody says otherwise the work is ours.
            if self._is_heard:
                logger.warning("training goes on, its news is kept: %s", error)
            self._is_heard = False

    def _order(self, child: Child, outcome: Outcome) -> None:
        """Stop the child, and remember why."""
        self._ordered = stronger_order(self._ordered, outcome)
        child.stop(self._post.settings.stop_grace_s)

    def _hear(self, line: bytes) -> None:
        """Take in one line of the child."""
        try:
            message = CHILD_MESSAGE.validate_json(line)
        except ValidationError:
            logger.warning("the child said what is no message of ours: %.200r", line)
            return
        match message:
            case ReadyMessage():
                pass
            case PhaseMessage():
                self._metrics = self._metrics.model_copy(update={"phase": message.name})
                self._say(message.detail or message.name, is_urgent=True)
            case StepMessage():
                self._hear_step(message)
            case EvalMessage():
                self._hear_eval(message)
            case AnswerMessage():
                text = f"After step {message.step}, asked {message.prompt!r}, it answers: {message.answer}"
                self._say(text, data=message.model_dump(exclude={"kind"}))
            case CheckpointMessage():
                self._spool.add_checkpoint(
                    CheckpointReport.model_validate(message.model_dump(exclude={"kind"}))
                )
                self._say(f"Checkpoint of step {message.step} saved", is_urgent=True)
            case LogMessage():
                self._say(message.message, message.level)
            case DoneMessage():
                self._metrics = self._metrics.model_copy(update=message.metrics.model_dump(exclude_none=True))
                self._words = message
            case StoppedMessage() | FailedMessage():
                self._words = message
            case _:
                assert_never(message)

    def _hear_eval(self, measured: EvalMessage) -> None:
        prefix = "base_" if measured.of == "base" else ""
        known = {
            f"{prefix}eval_loss": measured.loss,
            f"{prefix}perplexity": measured.perplexity,
            f"{prefix}token_accuracy": measured.token_accuracy,
        }
        self._metrics = self._metrics.model_copy(update=known)
        text = measured.text or f"Held-out loss of the {measured.of} model: {measured.loss:.4f}"
        # The names of OpenAI's own metrics events.
        data = {
            "step": measured.step,
            "full_valid_loss": measured.loss,
            "full_valid_mean_token_accuracy": measured.token_accuracy,
            "perplexity": measured.perplexity,
        }
        self._say(text, is_urgent=True, data=data)

    def _hear_step(self, step: StepMessage) -> None:
        known = step.model_dump(exclude={"kind"}, exclude_none=True)
        self._metrics = self._metrics.model_copy(update=known)
        if step.step % self._claim.config.logging_steps and step.step != step.total_steps:
            return
        data = {("train_loss" if name == "loss" else name): value for name, value in known.items()}
        loss = "" if step.loss is None else f" loss {step.loss:.4g}"
        text = f"Step {step.step}/{step.total_steps}{loss}"
        self._spool.add(EventReport(created_at=time.time(), message=text, type="metrics", data=data))

    def _say(
        self,
        message: str,
        level: EventLevel = EventLevel.INFO,
        *,
        is_urgent: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        event = EventReport(created_at=time.time(), level=level, message=message, data=data)
        self._spool.add(event, is_urgent=is_urgent)

    def _log_tail(self) -> str:
        return tail(self._log_path, since_byte=self._log_start)

    def _with_log(self, message: str) -> str:
        last_lines = self._log_tail()
        where = self._post.settings.home.relative(self._log_path)
        return f"{message}\nLast lines of {where}:\n{last_lines}" if last_lines else message

    def _finish(self, ending: Ending) -> None:
        logger.info("job %s: %s %s", self._claim.job_id, ending.outcome.value, ending.error_code or "")
        finish = Finish(
            worker_id=self._post.worker_id,
            attempt=self._claim.attempt,
            outcome=ending.outcome,
            error_code=ending.error_code,
            error_message=ending.error_message,
            error_param=ending.error_param,
            metrics=self._metrics,
        )
        if ending.outcome is Outcome.SUCCEEDED and isinstance(self._words, DoneMessage):
            finish.base_model = self._words.base_model
            finish.adapter_path = self._words.adapter_path
            finish.meta = self._words.meta
        stopping, patience_s = self._post.stopping, self._post.settings.finish_patience_s
        # The news first: after the finish nobody takes it.
        while len(self._spool):
            if not until_accepted(self._send_news, "news", stopping=stopping, patience_s=patience_s):
                break
        until_accepted(
            lambda: self._post.link.tell(f"{self._path}/finish", finish),
            f"the finish of {self._claim.job_id}",
            stopping=stopping,
            patience_s=patience_s,
        )
