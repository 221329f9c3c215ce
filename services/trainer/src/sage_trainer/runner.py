"""One job, from the doorbell to the finish: its children, one after another, and what is told of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sage.tools.finetune.hardware import physical_cores
from sage_contracts.config import OomRung
from sage_contracts.errors import InvalidRequestError, SageError, StorageFullError
from sage_contracts.jobs import EventLevel
from sage_contracts.workers import Finish, Order, Outcome, Report, ReportReply, TrainClaim
from sage_servicekit.attempt import Attempt, Ending, Post, Runner
from sage_servicekit.children import Child, computing_env
from sage_servicekit.machine import Device, oom_kill_count
from sage_trainer.child_deaths import ChildDeaths
from sage_trainer.ending import ending_of, fault, stronger_order
from sage_trainer.folders import (
    give_up_checkpoints,
    has_checkpoint,
    remove_leftovers,
    show_version,
    sign_checkpoints,
)
from sage_trainer.messages import (
    CHILD_MESSAGE,
    CheckpointMessage,
    ChildMessage,
    ChildSpec,
    DoneMessage,
    RestartMessage,
)
from sage_trainer.news import News
from sage_trainer.settings import TrainerSettings
from sage_trainer.spare import Spare
from sage_trainer.spool import Spool

logger = logging.getLogger(__name__)

_NEVER_RESUMED = (Outcome.FAILED, Outcome.CANCELLED)
_OUTCOMES = {Order.CANCEL: Outcome.CANCELLED, Order.PAUSE: Outcome.PAUSED}


@dataclass(frozen=True)
class TrainerPost(Post):
    settings: TrainerSettings
    spare: Spare


def child_env(settings: TrainerSettings, device: Device) -> dict[str, str]:
    """The environment of a training child."""
    env = computing_env(settings.home.root, settings.train_threads or physical_cores())
    env["TOKENIZERS_PARALLELISM"] = "false"
    shown = device.env
    if device.is_cuda and settings.train_device in ("auto", "cuda") and "CUDA_VISIBLE_DEVICES" in env:
        # All that are named there take part in a run, and the first is the one that is leased.
        del shown["CUDA_VISIBLE_DEVICES"]
    return env | shown


class TrainRunner(Runner[TrainClaim]):
    noun = "job"
    claim_type = TrainClaim
    _post: TrainerPost

    def _attempt(self, claimed: TrainClaim) -> None:
        try:
            TrainAttempt(self._post, claimed).run()
        finally:
            # Only once somebody trains here: a stack that merely runs stays small.
            if not self._post.stopping.is_set():
                self._post.spare.keep(claimed.config.model_name)


class TrainAttempt(Attempt[TrainClaim, ChildMessage]):
    worker = "trainer"
    noun = "job"
    verb = "train"
    messages = CHILD_MESSAGE
    _post: TrainerPost

    def __init__(self, post: TrainerPost, claimed: TrainClaim) -> None:
        super().__init__(post, claimed, claimed.job_id, stop_grace_s=post.settings.stop_grace_s)
        self._news = News(Spool(post.settings.spool_events), claimed.config.logging_steps)
        self._ordered: Outcome | None = None

    def _work(self) -> Ending:
        """One child after another, as long as memory does not suffice and something can be changed."""
        checkpoints = self._output_dir / "checkpoints"
        deaths = ChildDeaths(self._claim, checkpoints, self._post.device.name, oom_kill_count)
        rungs: Sequence[OomRung] = ()
        while True:
            deaths.begin()
            exit_code = self._train(rungs)
            words, is_over = self._news.last_words, self._ordered is not None or self._is_lost
            if isinstance(words, RestartMessage) and not is_over:
                continue  # it has written down its rungs: the next one finds them
            ending = ending_of(
                self._ordered, words, exit_code, self._with_log, has_checkpoint=self._has_checkpoint()
            )
            if words is not None or is_over:
                return ending
            after = deaths.after(exit_code, self._log_tail())
            if after is None:
                return ending
            if isinstance(after, Ending):
                return replace(after, error_message=self._with_log(after.error_message or ""))
            self._news.say(after.message, EventLevel.WARN, is_urgent=True)
            rungs = after.rungs

    def _broken_by(self, error: OSError, message: str) -> Ending:
        ending = super()._broken_by(error, message)
        if ending.error_code == StorageFullError.code:
            return replace(ending, outcome=Outcome.SUSPENDED)  # it takes nothing away
        outcome, message = fault(message, has_checkpoint=self._has_checkpoint())
        return replace(ending, outcome=outcome, error_message=message)

    def _has_checkpoint(self) -> bool:
        return has_checkpoint(self._output_dir, self._work_id)

    @property
    def _output_dir(self) -> Path:
        return self._post.settings.home.resolve(self._claim.output_dir)

    def _train(self, rungs: Sequence[OomRung]) -> int:
        """One child that begins on these rungs. Returns its exit code."""
        self._news.last_words = None
        home, device = self._post.settings.home, self._post.device.name
        spec = ChildSpec(home=str(home.root), device=device, claim=self._claim, rungs=list(rungs))
        end = self._run_child(spec)
        # This one has told again what earlier attempts did, and from now on everything is heard here.
        self._claim = self._claim.model_copy(update={"told_step": None})
        if self._ordered is not None and end.was_killed:
            grace = f"{self._post.settings.stop_grace_s:.0f} s"
            text = f"The training process did not stop within {grace} and was killed"
            self._news.say(text, EventLevel.WARN)
        if not self._is_lost:
            remove_leftovers(self._output_dir)
        return end.exit_code

    def _spawn(self, spec_path: Path) -> Child:
        """The child that waits for a job, or a new one. Raises: OSError."""
        post = self._post
        if (ready := post.spare.take(spec_path, self._log_path)) is not None:
            return ready
        command = [*post.settings.train_child_command, str(spec_path)]
        return Child(command, log_path=self._log_path, env=child_env(post.settings, post.device))

    @property
    def _is_urgent(self) -> bool:
        return self._news.spool.is_urgent

    def _send_news(self) -> Outcome | None:
        events, checkpoints = self._news.spool.batch()
        report = Report(
            worker_id=self._post.worker_id,
            attempt=self._claim.attempt,
            events=events,
            checkpoints=checkpoints,
            metrics=self._news.metrics,
        )
        reply = self._post.link.post(f"{self._path}/events", report, ReportReply)
        self._news.spool.sent()
        return _OUTCOMES.get(reply.order)

    def _not_accepted(self, error: SageError, child: Child) -> None:
        if isinstance(error, InvalidRequestError):
            logger.error("a report that will never be accepted is dropped: %s", error)
            self._news.spool.sent()
        else:
            super()._not_accepted(error, child)

    def _stop(self, child: Child, outcome: Outcome) -> None:
        """Stop the child, and remember why."""
        self._ordered = stronger_order(self._ordered, outcome)
        super()._stop(child, outcome)

    def _take_in(self, message: ChildMessage) -> None:
        if isinstance(message, CheckpointMessage):
            sign_checkpoints(self._output_dir, self._work_id)
        self._news.take_in(message)

    def _finish(self, ending: Ending) -> bool:
        # While the folder is still ours: after the finish the next job of the name may write there.
        self._show_model(has_succeeded=ending.outcome is Outcome.SUCCEEDED)
        # The news first: after the finish nobody takes it.
        while len(self._news.spool):
            if not self._deliver(self._send_news, "news"):
                break
        is_known = super()._finish(ending)
        if is_known and ending.outcome in _NEVER_RESUMED:
            # Not before it is known: until then the job may be given to somebody who goes on from them.
            give_up_checkpoints(self._output_dir, self._work_id)
        return is_known

    def _show_model(self, *, has_succeeded: bool) -> None:
        """Have the top of the folder be what the bare name means."""
        named = self._claim.named_version or 0
        try:
            show_version(self._output_dir, max(named, self._claim.version) if has_succeeded else named)
        except (OSError, StorageFullError) as error:
            text = f"{self._claim.output_dir} shows another version than {self._claim.name} means: {error}"
            self._news.say(text, EventLevel.WARN)

    def _finish_of(self, ending: Ending) -> Finish:
        words = self._news.last_words
        finish = Finish(
            worker_id=self._post.worker_id,
            attempt=self._claim.attempt,
            outcome=ending.outcome,
            error_code=ending.error_code,
            error_message=ending.error_message,
            error_param=ending.error_param,
            metrics=self._news.metrics,
        )
        if ending.outcome is Outcome.SUCCEEDED and isinstance(words, DoneMessage):
            finish.base_model = words.base_model
            finish.adapter_path = words.adapter_path
            finish.meta = words.meta
        return finish
