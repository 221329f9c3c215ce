"""What the training child says while it trains: the engine's callbacks, as messages to its parent."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO, TYPE_CHECKING, Literal

from pydantic import BaseModel

from sage.tools.finetune.callbacks import (
    CheckpointInfo,
    Evaluation,
    GeneratedAnswer,
    StepMetrics,
    TrainingCallback,
    evaluation_text,
)
from sage_contracts.home import Home
from sage_contracts.jobs import EventLevel
from sage_trainer.messages import (
    AnswerMessage,
    CheckpointMessage,
    EvalMessage,
    LogMessage,
    PhaseMessage,
    StepMessage,
)

if TYPE_CHECKING:
    from sage.tools.finetune.ladder import Rung

_SENTENCES = {
    "data": "Preparing data",
    "base_model": "Base model: {detail}",
    "training": "Training: {detail}",
    "saving": "Saving the weights",
}
_ASKS_FOR_STOP = {"base_eval", "training", "eval"}
"""Phases in which the engine asks `should_stop` often."""
_SETTLED = {"saving", "version"}
"""Phases that are short and better finished than stopped."""


class StopNow(BaseException):
    """SIGTERM arrived while there is nothing to save. Not for `except Exception` to catch."""


class RestartNow(BaseException):
    """Memory did not suffice here; a new process has all of it. Not for `except Exception` to catch."""


class Telling(TrainingCallback):
    """The engine's callbacks, said to the parent; and SIGTERM, said to the engine."""

    def __init__(self, out: IO[str], home: Home, device: str) -> None:
        self._out = out
        self._home = home
        self._device = device
        self._phase = "start"
        self._is_stopping = False
        self.checkpoint_step: int | None = None

    def say(self, message: BaseModel) -> None:
        self._out.write(message.model_dump_json() + "\n")

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._phase not in _ASKS_FOR_STOP | _SETTLED:
            raise StopNow

    def should_stop(self) -> Literal["save_and_stop"] | None:
        return "save_and_stop" if self._is_stopping else None

    def on_phase(self, name: str, detail: str) -> None:
        self._phase = name
        text = _SENTENCES.get(name, "{detail}").format(detail=detail)
        log_line(text)
        self.say(PhaseMessage(name=name, detail=text))
        if self._is_stopping and name not in _ASKS_FOR_STOP | _SETTLED:
            raise StopNow

    def on_step(self, metrics: StepMetrics) -> None:
        self.say(
            StepMessage(
                step=metrics.step,
                total_steps=metrics.total_steps,
                epoch=metrics.epoch,
                loss=metrics.loss,
                train_token_accuracy=metrics.token_accuracy,
                learning_rate=metrics.lr,
                tokens_per_second=metrics.tokens_per_second,
                eta_s=metrics.eta_s,
                trained_tokens=metrics.trained_tokens,
                peak_memory_bytes=metrics.peak_memory_bytes,
            )
        )

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        self.checkpoint_step = checkpoint.step
        self._say_checkpoint(checkpoint, is_repeated=False)

    def on_earlier_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        """An earlier attempt has written it."""
        self._say_checkpoint(checkpoint, is_repeated=True)

    def _say_checkpoint(self, checkpoint: CheckpointInfo, *, is_repeated: bool) -> None:
        self.say(
            CheckpointMessage(
                step=checkpoint.step,
                path=self._home.relative(checkpoint.path),
                train_loss=checkpoint.train_loss,
                eval_loss=checkpoint.eval_loss,
                is_repeated=is_repeated,
            )
        )

    def on_eval(self, evaluation: Evaluation) -> None:
        text = evaluation_text(evaluation)
        log_line(text)
        self.say(
            EvalMessage(
                of=evaluation.name,
                step=evaluation.step,
                loss=evaluation.loss,
                perplexity=evaluation.perplexity,
                token_accuracy=evaluation.token_accuracy,
                text=text[0].upper() + text[1:],
            )
        )

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        for one in answers:
            self.say(AnswerMessage(step=step, prompt=one.prompt, answer=one.answer))

    def on_rung(self, rung: Rung) -> None:
        # CUDA's allocator gives everything back. The C library's heap is full of holes by now: what a new
        # process could load may not fit into this one again.
        if self._device == "cpu":
            raise RestartNow

    def on_log(self, level: Literal["info", "warn", "error"], message: str) -> None:
        log_line(message)
        self.say(LogMessage(level=EventLevel(level), message=message))


def log_line(text: str) -> None:
    """Into the job's log; a full disk must not end a run for the sake of a line."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
