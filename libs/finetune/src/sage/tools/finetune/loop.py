"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import CheckpointInfo, StepMetrics, StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.distributed.team import ALONE, Team
from sage.tools.finetune.evaluation import HeldOut, RunStopped
from sage.tools.finetune.hardware import peak_memory_bytes
from sage.tools.finetune.learning_rate import rate_factor
from sage.tools.finetune.losses import LossFunction
from sage.tools.finetune.random_numbers import RandomNumbers
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.rollback import forget_lost_best, judge, note_rollback, propose, wanted_steps
from sage.tools.finetune.watchdog import Fault
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import TrainingFailedError

RATE_WINDOW = 10  # steps that tokens/s and the remaining time are judged by


@dataclass
class TrainingLoop:
    """One run's moving parts. `run` goes from `state.step` to the schedule's end."""

    model: Any
    loss: LossFunction
    optimizer: Any
    samples: Sequence[Sample]
    schedule: Schedule
    config: TrainingConfig
    token_budget: int
    """Tokens per forward pass."""
    callbacks: TrainingCallback
    checkpoints: Checkpoints
    state: RunState
    device: str
    held: HeldOut
    restart: Callable[[], None]
    """Puts model, optimiser and random numbers back to step 0."""
    rows_at_once: int | None = None
    """Rows per forward pass; None: as many as the tokens allow."""
    scaler: Any = None
    """Loss scaling, for fp16 only."""
    team: Team = ALONE
    """The processes that share every step."""
    measure_base: Callable[[RunState], None] | None = None
    """Done once, after the first step: the run need not wait for it to begin."""
    last_metrics: StepMetrics | None = None
    _saved_step: int = 0
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def run(self) -> StopMode | None:
        """Train to the end, or until a callback wishes to save and stop.

        Raises: RunStopped, TrainingFailedError.
        """
        self.model.train()
        self._saved_step = self.state.step
        # A resumed run may have been stopped before its evaluation was done.
        wish = self._evaluate_if_due()
        while not (wish or self._is_done):
            before = RandomNumbers.now()
            try:
                fault = self._step()
            except RunStopped as stop:
                if stop.mode == "stop":
                    raise
                self._give_up_step(before)
                wish = stop.mode
                break
            if fault:
                self._roll_back(fault)
                continue
            wish = self._measure_base() or self.callbacks.should_stop() or self._evaluate_if_due()
            if wish == "stop":
                raise RunStopped(wish)
            if wish or self._is_done or self._is_best_now or self._is_save_due:
                self._save()
        return None if self._is_done else wish

    def _give_up_step(self, before: RandomNumbers) -> None:
        """Save as of the last step that was done: the end of this one may be minutes away."""
        self.optimizer.zero_grad(set_to_none=True)
        before.put_back()
        if self.state.step > self._saved_step:
            self._save()

    def _measure_base(self) -> StopMode | None:
        """What interrupted it, when something did; it is done after the next step then."""
        if self.measure_base is not None:
            try:
                self.measure_base(self.state)
            except RunStopped as stop:
                return stop.mode
            self.measure_base = None
        return None

    @property
    def _is_done(self) -> bool:
        return self.state.has_ended_early or self.state.step >= self.schedule.total_steps

    @property
    def _is_save_due(self) -> bool:
        every = self.config.save_steps
        return self.state.step // every > self._saved_step // every

    @property
    def _is_best_now(self) -> bool:
        best = self.state.best
        return self.config.keep_best and best is not None and best["step"] == self.state.step

    def _evaluate_if_due(self) -> StopMode | None:
        """Measure the held-out rows every `eval_steps`; what interrupted that, when something did."""
        state, every = self.state, self.config.eval_steps
        if not every or state.step == 0 or state.step % every:
            return None
        if state.evaluation and state.evaluation["step"] == state.step:
            return None
        try:
            scores = self.held.measure()
        except RunStopped as stop:
            return stop.mode
        is_best = False
        if scores is not None:
            figures = {"token_accuracy": scores.token_accuracy}
            is_best = note_evaluation(state, scores.loss, self.config.early_stopping_patience, figures)
        self.held.tell("step", state.step, scores, is_best=is_best)
        state.answered_step = state.step
        if state.has_ended_early:
            self.callbacks.on_log("info", early_end_text(state))
        return None

    def _step(self) -> Fault | None:
        """One optimiser step; what is wrong with it, if something is. Raises: RunStopped, half-way."""
        began = time.monotonic()
        rows = [self.samples[index] for index in self.schedule.rows_of(self.state.step)]
        tokens = sum(len(row.ids) for row in rows)
        labels = sum(row.label_count for row in rows)
        rate = self._set_rate()
        self.team.begin_step(self.config.seed, self.state.step)
        summed, hits = 0.0, 0
        groups = self.loss.groups(rows, self.token_budget, self.rows_at_once)
        for group in self.team.share(groups, partial(self.loss.computed_by, rows)):
            if wish := self.callbacks.should_stop():
                raise RunStopped(wish)
            if not group:
                self.team.idle(lambda: self.loss(rows[:1]))
                continue
            loss, right = self.loss.with_hits([rows[index] for index in group])
            summed += loss.item()
            hits += int(right)
            # Every label token of the effective batch weighs the same, however the batch is cut up.
            mean = loss / labels
            (self.scaler.scale(mean) if self.scaler else mean).backward()
        summed = self.team.total(summed)
        if not (isfinite(summed) and self._update()):
            self.optimizer.zero_grad(set_to_none=True)
            return Fault("nan", self.state.step + 1, summed / labels)
        self.state.step += 1
        self.state.trained_tokens += tokens
        self.state.train_loss = summed / labels
        self._recent.append((time.monotonic() - began, tokens))
        self.last_metrics = self._metrics(rate, self.team.total(hits) / labels)
        self.callbacks.on_step(self.last_metrics)
        is_spike = judge(self.state, summed / labels) == "spike" and self._rollbacks_allowed
        return Fault("spike", self.state.step, summed / labels) if is_spike else None

    def _set_rate(self) -> float:
        """The learning rate of the step to come, given to the optimiser."""
        rate = self.config.learning_rate * self.state.rate_scale
        rate *= rate_factor(
            self.config.lr_scheduler_type,
            self.state.step,
            self.schedule.total_steps,
            self.config.warmup_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_share"]
        return rate

    def _update(self) -> bool:
        """Move the weights; False, and nothing is moved, when the gradient is no number."""
        from torch.nn.utils import clip_grad_norm_

        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.team.sum_gradients(trained)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(trained, self.config.max_grad_norm or float("inf"))
        # A loss scaler looks for itself: it passes over such a step and scales less.
        if not self.scaler and not isfinite(norm):
            return False
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _roll_back(self, fault: Fault) -> None:
        """Go back to the last good checkpoint, or to the start, with a lower learning rate.

        Raises: TrainingFailedError, when that was done often enough.
        """
        state = self.state
        if len(state.rollbacks) >= self._rollbacks_allowed:
            raise TrainingFailedError(fault.advice(self.config.learning_rate, len(state.rollbacks)))
        self.team.total(0.0)  # nobody looks at the checkpoints while another still writes one
        target = self.checkpoints.newest_whole(self._warn, upto=state.good_step)
        if target:
            self.state = self.checkpoints.restore(target, self.model, self.optimizer, self.scaler)
        else:
            self.restart()
            self.state = RunState()
        forget_lost_best(self.state, self.checkpoints, keep_best=self.config.keep_best)
        self._warn(note_rollback(self.state, state, fault).text(self.config.learning_rate))
        self.team.total(0.0)  # nobody deletes what another still reads
        self.checkpoints.drop_after(self.state.step)
        # Whoever resumes from here has to know of it.
        self.checkpoints.save(self.state, self.model, self.optimizer, self.scaler)
        self._saved_step = self.state.step

    @property
    def _rollbacks_allowed(self) -> int:
        return self.config.max_rollbacks if self.team.can_restore else 0

    def _warn(self, message: str) -> None:
        self.callbacks.on_log("warn", message)

    def _metrics(self, rate: float, token_accuracy: float) -> StepMetrics:
        seconds = sum(seconds for seconds, _ in self._recent)
        remaining = self.schedule.total_steps - self.state.step
        return StepMetrics(
            step=self.state.step,
            total_steps=self.schedule.total_steps,
            loss=self.state.train_loss or 0.0,
            lr=rate,
            tokens_per_second=sum(tokens for _, tokens in self._recent) / max(seconds, 1e-9),
            eta_s=remaining * seconds / len(self._recent),
            epoch=self.schedule.epoch_of(self.state.step),
            peak_memory_bytes=peak_memory_bytes(self.device),
            trained_tokens=self.state.trained_tokens,
            token_accuracy=token_accuracy,
        )

    def _save(self) -> None:
        state, measured = self.state, self.state.evaluation
        self._saved_step = state.step
        if self._rollbacks_allowed:
            propose(state)
        path = self.checkpoints.save(state, self.model, self.optimizer, self.scaler)
        wanted = wanted_steps(state, keep_best=self.config.keep_best)
        self.checkpoints.keep_newest(self.config.save_total_limit, besides=wanted)
        eval_loss = measured["loss"] if measured and measured["step"] == state.step else None
        self.callbacks.on_checkpoint(CheckpointInfo(state.step, path, state.train_loss, eval_loss))


def note_evaluation(state: RunState, loss: float, patience: int, figures: Mapping[str, float]) -> bool:
    """Enter an evaluation between steps into the state; whether it is the best so far."""
    state.evaluation = {"step": state.step, "loss": loss, **figures}
    # What is no number is no better than nothing, and nothing would ever be better than it.
    is_best = isfinite(loss) and (state.best is None or loss < state.best["loss"])
    if is_best:
        state.best, state.stale_evaluations = state.evaluation, 0
    else:
        state.stale_evaluations += 1
        state.has_ended_early = 0 < patience <= state.stale_evaluations
    return is_best


def early_end_text(state: RunState) -> str:
    told = f"Stopping early after step {state.step}: {state.stale_evaluations} evaluations in a row"
    if state.best is None:
        return f"{told} gave a loss that is no number"
    return f"{told} were no better than {state.best['loss']:.4f}"
