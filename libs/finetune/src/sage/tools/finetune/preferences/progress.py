"""What TRL's trainer reports, said to our callbacks; and their wishes, said to it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import CheckpointInfo, Evaluation, StepMetrics, StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.evaluation import RunStopped
from sage.tools.finetune.hardware import peak_memory_bytes
from sage.tools.finetune.loop import RATE_WINDOW, early_end_text, note_evaluation
from sage.tools.finetune.preferences.scoring import Scores
from sage.tools.finetune.random_numbers import RandomNumbers
from sage.tools.finetune.rollback import judge, propose, wanted_steps
from sage.tools.finetune.watchdog import Fault
from sage_contracts.config import TrainingConfig

_MASKS = ("attention_mask", "KL_attention_mask", "chosen_attention_mask", "rejected_attention_mask")
"""Of what is passed through the model; the names differ by trainer."""


StateT = TypeVar("StateT", bound=RunState)


class StepFailed(Exception):  # noqa: N818 - it is for whoever goes back
    """Leaves the trainer: what it learns from here on is worth nothing."""

    def __init__(self, fault: Fault, learning_rate: float) -> None:
        super().__init__(fault.advice(learning_rate, 0))
        self.fault = fault


class Progress(Generic[StateT]):
    """One run's counters. A step: `forward` per micro-batch, `step_logged`, `wish`, maybe `saved`.

    `measure` asks the model about the held-out rows; None where there are none. It may raise RunStopped.
    `answer` lets the model answer the sample prompts, which are told with the step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        schedule: Schedule,
        state: StateT,
        checkpoints: Checkpoints,
        callbacks: TrainingCallback,
        device: str,
        measure: Callable[[], Scores] | None = None,
        answer: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.last_metrics: StepMetrics | None = None
        self.stopped: StopMode | None = None
        self.saved_step = state.step
        self.random: RandomNumbers | None = None
        """As the last step of this process left them."""
        self._config = config
        self._schedule = schedule
        self.state = state
        self._checkpoints = checkpoints
        self._callbacks = callbacks
        self._device = device
        self._measure = measure
        self._answer = answer
        self._tokens = 0
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    def began(self) -> None:
        """Training starts now: loading and skipping rows is no part of the first step."""
        self._began, self._tokens = time.monotonic(), 0

    def forward(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch is about to be run. Raises: RunStopped."""
        if wish := self._callbacks.should_stop():
            raise RunStopped(wish)
        self._count(batch)

    def _count(self, batch: Mapping[str, Any]) -> int:
        """Take in its tokens, without padding; returns how many they are."""
        tokens = sum(int(batch[name].sum()) for name in _MASKS if name in batch)
        self._tokens += tokens
        return tokens

    def step_logged(self, step: int, logs: Mapping[str, float]) -> None:
        """An optimiser step is done and its loss known. Raises: StepFailed."""
        loss, now = logs["loss"], time.monotonic()
        if not isfinite(loss):
            raise StepFailed(Fault("nan", step, loss), self._config.learning_rate)
        self._recent.append((now - self._began, self._tokens))
        self.state.step, self.state.train_loss = step, loss
        self.state.trained_tokens += self._tokens
        self._began, self._tokens = now, 0
        self.last_metrics = self._metrics(logs["learning_rate"])
        self._callbacks.on_step(self.last_metrics)
        if judge(self.state, loss) == "spike" and self._config.max_rollbacks:
            raise StepFailed(Fault("spike", step, loss), self._config.learning_rate)

    def wish(self) -> StopMode | None:
        """What is to happen after this step, which is measured if it is time. Raises: RunStopped."""
        wish = self._callbacks.should_stop() or self.evaluate_if_due()
        if wish == "stop":
            raise RunStopped(wish)
        if wish and self.state.step < self._schedule.total_steps:
            self.stopped = wish
        return wish

    def evaluate_if_due(self) -> StopMode | None:
        """Measure the held-out rows every `eval_steps`; what interrupted that, when something did."""
        state, every = self.state, self._config.eval_steps
        if not every or state.step == 0 or state.step % every:
            return None
        if state.evaluation and state.evaluation["step"] == state.step:
            return None
        try:
            found = self._measure() if self._measure else None
        except RunStopped as stop:
            return stop.mode
        if found:
            self._take_in(found)
        self._answer(state.step)
        state.answered_step = state.step
        if state.has_ended_early:
            self._callbacks.on_log("info", early_end_text(state))
        self._began = time.monotonic()  # that was no part of the next step
        return None

    def _take_in(self, found: Scores) -> None:
        state = self.state
        figures = {"reward_accuracy": found.reward_accuracy, "reward_margin": found.reward_margin}
        is_best = note_evaluation(state, found.loss, self._config.early_stopping_patience, figures)
        self._callbacks.on_eval(Evaluation("step", state.step, found.loss, is_best=is_best))

    @property
    def is_done(self) -> bool:
        return self.state.step >= self._schedule.total_steps

    @property
    def rate_scale(self) -> float:
        """What rollbacks have left of the learning rate."""
        return self.state.rate_scale

    @property
    def has_ended_early(self) -> bool:
        return self.state.has_ended_early

    @property
    def is_best_now(self) -> bool:
        """Whether this step's weights are to be kept."""
        best = self.state.best
        return self._config.keep_best and best is not None and best["step"] == self.state.step

    def saved(self, path: Path) -> None:
        """The trainer has written a checkpoint: from now on it counts."""
        if self._config.max_rollbacks:
            propose(self.state)
        self._checkpoints.seal(path, self.state)
        self.saved_step = self.state.step
        wanted = wanted_steps(self.state, keep_best=self._config.keep_best)
        self._checkpoints.keep_newest(self._config.save_total_limit, besides=wanted)
        measured = self.state.evaluation
        eval_loss = measured["loss"] if measured and measured["step"] == self.state.step else None
        self._callbacks.on_checkpoint(CheckpointInfo(self.state.step, path, self.state.train_loss, eval_loss))
        self._began = time.monotonic()

    def _metrics(self, rate: float) -> StepMetrics:
        seconds = sum(seconds for seconds, _ in self._recent)
        step = self.state.step
        return StepMetrics(
            step=step,
            total_steps=self._schedule.total_steps,
            loss=self.state.train_loss or 0.0,
            lr=rate,
            tokens_per_second=sum(tokens for _, tokens in self._recent) / max(seconds, 1e-9),
            eta_s=(self._schedule.total_steps - step) * seconds / len(self._recent),
            epoch=self._schedule.epoch_of(step),
            peak_memory_bytes=peak_memory_bytes(self._device),
            trained_tokens=self.state.trained_tokens,
        )
