"""What a training child says, put into events and metrics that people and the orchestrator understand."""

from __future__ import annotations

import time
from typing import Any, assert_never

from sage_contracts.jobs import EventLevel, JobMetrics
from sage_contracts.workers import CheckpointReport, EventReport
from sage_trainer.ending import LastWords
from sage_trainer.messages import (
    AnswerMessage,
    CheckpointMessage,
    ChildMessage,
    DoneMessage,
    EvalMessage,
    FailedMessage,
    LogMessage,
    PhaseMessage,
    ReadyMessage,
    RestartMessage,
    StepMessage,
    StoppedMessage,
)
from sage_trainer.spool import Spool

_IN_EVENTS = {"loss": "train_loss", "train_token_accuracy": "train_mean_token_accuracy"}
"""The names of OpenAI's own metrics events, where they differ from ours."""


class News:
    """Of one attempt: what waits in the spool, and what is known so far."""

    def __init__(self, spool: Spool, logging_steps: int) -> None:
        """Of the steps every `logging_steps`-th becomes an event, and the last."""
        self.spool = spool
        self.metrics = JobMetrics()
        self.last_words: LastWords | None = None
        self._logging_steps = logging_steps

    def say(
        self,
        message: str,
        level: EventLevel = EventLevel.INFO,
        *,
        is_urgent: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        event = EventReport(created_at=time.time(), level=level, message=message, data=data)
        self.spool.add(event, is_urgent=is_urgent)

    def take_in(self, message: ChildMessage) -> None:
        """Remember what the child said, and make an event of what people want to know."""
        match message:
            case ReadyMessage():
                pass
            case PhaseMessage():
                self.metrics = self.metrics.model_copy(update={"phase": message.name})
                self.say(message.detail or message.name, is_urgent=True)
            case StepMessage():
                self._take_in_step(message)
            case EvalMessage():
                self._take_in_eval(message)
            case AnswerMessage():
                text = f"After step {message.step}, asked {message.prompt!r}, it answers: {message.answer}"
                self.say(text, data=message.model_dump(exclude={"kind"}))
            case CheckpointMessage():
                self._take_in_checkpoint(message)
            case LogMessage():
                self.say(message.message, message.level)
            case DoneMessage():
                self.metrics = self.metrics.model_copy(update=message.metrics.model_dump(exclude_none=True))
                self.last_words = message
            case StoppedMessage() | RestartMessage() | FailedMessage():
                self.last_words = message
            case _:
                assert_never(message)

    def _take_in_checkpoint(self, written: CheckpointMessage) -> None:
        report = written.model_dump(exclude={"kind", "is_repeated"})
        self.spool.add_checkpoint(CheckpointReport.model_validate(report))
        if not written.is_repeated:
            self.say(f"Checkpoint of step {written.step} saved", is_urgent=True)

    def _take_in_eval(self, measured: EvalMessage) -> None:
        prefix = "base_" if measured.of == "base" else ""
        known = {
            f"{prefix}eval_loss": measured.loss,
            f"{prefix}perplexity": measured.perplexity,
            f"{prefix}token_accuracy": measured.token_accuracy,
        }
        self.metrics = self.metrics.model_copy(update=known)
        loss = "no number" if measured.loss is None else f"{measured.loss:.4f}"
        text = measured.text or f"Held-out loss of the {measured.of} model: {loss}"
        # The names of OpenAI's own metrics events.
        data = {
            "step": measured.step,
            "full_valid_loss": measured.loss,
            "full_valid_mean_token_accuracy": measured.token_accuracy,
            "perplexity": measured.perplexity,
        }
        self.say(text, is_urgent=True, data=data)

    def _take_in_step(self, step: StepMessage) -> None:
        known = step.model_dump(exclude={"kind", "is_repeated"}, exclude_none=True)
        self.metrics = self.metrics.model_copy(update=known)
        is_told = step.is_repeated or step.step == step.total_steps
        if step.step % self._logging_steps and not is_told:
            return
        data = {_IN_EVENTS.get(name, name): value for name, value in known.items()}
        loss = "" if step.loss is None else f" loss {step.loss:.4g}"
        total = "" if step.total_steps is None else f"/{step.total_steps}"
        text = f"Step {step.step}{total}{loss}"
        self.spool.add(EventReport(created_at=time.time(), message=text, type="metrics", data=data))
