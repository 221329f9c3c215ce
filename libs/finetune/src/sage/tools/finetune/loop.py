"""The training loop, top to bottom."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from sage.tools.finetune.batching import Schedule, micro_batches
from sage.tools.finetune.callbacks import CheckpointInfo, StepMetrics, StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.distributed.team import ALONE, Team
from sage.tools.finetune.hardware import peak_memory_bytes
from sage.tools.finetune.learning_rate import rate_factor
from sage.tools.finetune.losses import LossFunction
from sage.tools.finetune.rendering import Sample
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import TrainingFailedError

RATE_WINDOW = 10  # steps that tokens/s and the remaining time are judged by


class RunStopped(Exception):  # noqa: N818 - nothing went wrong
    """Leaves the run at once: somebody asked for it."""

    def __init__(self, mode: StopMode) -> None:
        super().__init__(mode)
        self.mode = mode


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
    rows_at_once: int | None = None
    """Rows per forward pass; None: as many as the tokens allow."""
    scaler: Any = None
    """Loss scaling, for fp16 only."""
    team: Team = ALONE
    """The processes that share every step."""
    last_metrics: StepMetrics | None = None
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def run(self) -> StopMode | None:
        """Train to the end, or until a callback wishes to save and stop.

        Raises: RunStopped, TrainingFailedError.
        """
        self.model.train()
        saved = self.state.step
        while self.state.step < self.schedule.total_steps:
            self._step()
            wish = self.callbacks.should_stop()
            if wish == "stop":
                raise RunStopped(wish)
            is_last = self.state.step == self.schedule.total_steps
            if is_last or wish or self.state.step % self.config.save_steps == 0:
                self._save()
                saved = self.state.step
            if wish and not is_last:
                return wish
        if saved < self.state.step:
            self._save()
        return None

    def _step(self) -> None:
        began = time.monotonic()
        rows = [self.samples[index] for index in self.schedule.rows_of(self.state.step)]
        tokens = sum(len(row.ids) for row in rows)
        labels = sum(row.label_count for row in rows)
        rate = self.config.learning_rate * rate_factor(
            self.config.lr_scheduler_type,
            self.state.step,
            self.schedule.total_steps,
            self.config.warmup_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_share"]

        self.team.begin_step(self.config.seed, self.state.step)
        lengths = [len(row.ids) for row in rows]
        summed = 0.0
        for group in self.team.share(micro_batches(lengths, self.token_budget, self.rows_at_once), lengths):
            if self.callbacks.should_stop() == "stop":
                raise RunStopped("stop")
            if not group:
                self.team.idle(lambda: self.loss(rows[:1]))
                continue
            loss = self.loss([rows[index] for index in group])
            summed += loss.item()
            # Every label token of the effective batch weighs the same, however the batch is cut up.
            mean = loss / labels
            (self.scaler.scale(mean) if self.scaler else mean).backward()
        summed = self.team.total(summed)
        if not isfinite(summed):
            raise TrainingFailedError(
                f"The loss became {summed} in step {self.state.step + 1}. Lower learning_rate "
                f"(now {self.config.learning_rate:g}) or use precision 'bf16' or 'fp32'."
            )
        self._update()
        self.state.step += 1
        self.state.trained_tokens += tokens
        self.state.train_loss = summed / labels
        self._recent.append((time.monotonic() - began, tokens))
        self.last_metrics = self._metrics(rate)
        self.callbacks.on_step(self.last_metrics)

    def _update(self) -> None:
        from torch.nn.utils import clip_grad_norm_

        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.team.sum_gradients(trained)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.config.max_grad_norm > 0:
            clip_grad_norm_(trained, self.config.max_grad_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _metrics(self, rate: float) -> StepMetrics:
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
        )

    def _save(self) -> None:
        path = self.checkpoints.save(self.state, self.model, self.optimizer, self.scaler)
        self.checkpoints.keep_newest(self.config.save_total_limit)
        self.callbacks.on_checkpoint(CheckpointInfo(self.state.step, path, self.state.train_loss))


def held_out_loss(
    model: Any, loss: LossFunction, samples: Sequence[Sample], token_budget: int, callbacks: TrainingCallback
) -> float | None:
    """Mean over the label tokens of all samples; None without samples. Raises: RunStopped."""
    import torch

    if not samples:
        return None
    model.eval()
    summed = 0.0
    with torch.no_grad():
        for group in micro_batches([len(sample.ids) for sample in samples], token_budget):
            wish = callbacks.should_stop()
            if wish:  # nothing is lost: what was trained is in a checkpoint already
                raise RunStopped(wish)
            summed += loss([samples[index] for index in group]).item()
    return summed / sum(sample.label_count for sample in samples)
