"""What a run tells those who watch it, and how they stop it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Literal, TextIO

from sage.tools.finetune.ladder import Rung
from sage.tools.finetune.registry import Registry

StopMode = Literal["save_and_stop", "stop"]
LogLevel = Literal["info", "warn", "error"]
EvaluationName = Literal["base", "step", "tuned"]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """After one optimiser step."""

    step: int
    """From 1."""
    total_steps: int
    loss: float
    """Mean over the step's label tokens."""
    lr: float
    tokens_per_second: float
    """Real tokens, prompts included, of the last few steps."""
    eta_s: float
    epoch: float
    peak_memory_bytes: int
    trained_tokens: int
    """Real tokens since the run began, resumed parts included."""
    token_accuracy: float | None = None
    """Share of the step's label tokens that were the model's first choice; None for preference methods."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    step: int
    path: Path
    train_loss: float | None
    eval_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Of the held-out rows: by the base before training, between steps, and by the tuned model at the end."""

    name: EvaluationName
    step: int
    loss: float
    token_accuracy: float | None = None
    """Share of label tokens that are the model's first choice; None where the loss is no mean over tokens."""
    is_best: bool = False
    """Better than every evaluation between steps before it."""

    @property
    def perplexity(self) -> float | None:
        return None if self.token_accuracy is None else perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Of a mean loss in nats per token."""
    return exp(loss) if loss < 700 else float("inf")


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """What the model says to one of `sample_prompts`."""

    prompt: str
    answer: str


class TrainingCallback:
    """Override what you need. Calls come from the training thread, so be quick."""

    def on_phase(self, name: str, detail: str) -> None:
        """A part of the run begins: base_model, data, loading, base_eval, training, eval, saving."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimiser step is done."""

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        """A checkpoint is on disk, whole."""

    def on_eval(self, evaluation: Evaluation) -> None:
        """The held-out rows were measured."""

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        """The model answered `sample_prompts`, after an evaluation."""

    def on_log(self, level: LogLevel, message: str) -> None:
        """Something a person may want to know."""

    def on_rung(self, rung: Rung) -> None:
        """Memory did not suffice: the run goes on with this changed. The log says it too."""

    def should_stop(self) -> StopMode | None:
        """Asked between forward passes: write a checkpoint and stop, stop at once, or None to go on."""
        return None


CALLBACKS: Registry[Callable[[], TrainingCallback]] = Registry("callback", "sage.finetune.callbacks")
"""Name -> what makes a callback for each job of the stack. From Python they are given to the trainer."""


class CallbackList(TrainingCallback):
    """Tells each in turn; the first wish to stop counts, "stop" above "save_and_stop"."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_phase(self, name: str, detail: str) -> None:
        for callback in self._callbacks:
            callback.on_phase(name, detail)

    def on_step(self, metrics: StepMetrics) -> None:
        for callback in self._callbacks:
            callback.on_step(metrics)

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        for callback in self._callbacks:
            callback.on_checkpoint(checkpoint)

    def on_eval(self, evaluation: Evaluation) -> None:
        for callback in self._callbacks:
            callback.on_eval(evaluation)

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        for callback in self._callbacks:
            callback.on_answers(step, answers)

    def on_log(self, level: LogLevel, message: str) -> None:
        for callback in self._callbacks:
            callback.on_log(level, message)

    def on_rung(self, rung: Rung) -> None:
        for callback in self._callbacks:
            callback.on_rung(rung)

    def should_stop(self) -> StopMode | None:
        wishes = {callback.should_stop() for callback in self._callbacks}
        return "stop" if "stop" in wishes else "save_and_stop" if "save_and_stop" in wishes else None


def evaluation_text(evaluation: Evaluation) -> str:
    """`held-out loss of the tuned model: 1.8980, perplexity 6.67, token accuracy 58.1 %`."""
    who = f"at step {evaluation.step}" if evaluation.name == "step" else f"of the {evaluation.name} model"
    text = f"held-out loss {who}: {evaluation.loss:.4f}"
    if evaluation.token_accuracy is not None:
        text += f", perplexity {evaluation.perplexity:.4g}, token accuracy {evaluation.token_accuracy:.1%}"
    return f"{text} (best so far)" if evaluation.is_best else text


class ConsoleProgress(TrainingCallback):
    """Plain lines on stderr: what `LoRATrainer(config).train()` shows when it is given no callbacks."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._began = time.monotonic()

    def on_phase(self, name: str, detail: str) -> None:
        self._line(f"{name}: {detail}")

    def on_step(self, metrics: StepMetrics) -> None:
        m = metrics
        self._line(
            f"step {m.step}/{m.total_steps}  loss {m.loss:.4f}  lr {m.lr:.2e}  "
            f"{m.tokens_per_second:.0f} tokens/s  {m.eta_s:.0f} s left"
        )

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        self._line(f"checkpoint: {checkpoint.path}")

    def on_eval(self, evaluation: Evaluation) -> None:
        self._line(evaluation_text(evaluation))

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        for one in answers:
            self._line(f"asked {one.prompt!r}, it answers {one.answer!r}")

    def on_log(self, level: LogLevel, message: str) -> None:
        self._line(message if level == "info" else f"{level}: {message}")

    def _line(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:7.1f} s] {text}", file=self._stream, flush=True)
