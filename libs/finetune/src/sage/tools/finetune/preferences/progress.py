"""What TRL's trainer reports, said to our callbacks; and their wishes, said to it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import CheckpointInfo, StepMetrics, StopMode, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.evaluation import RunStopped
from sage.tools.finetune.hardware import peak_memory_bytes
from sage.tools.finetune.loop import RATE_WINDOW
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import TrainingFailedError

_MASKS = ("attention_mask", "KL_attention_mask", "chosen_attention_mask", "rejected_attention_mask")
"""Of what is passed through the model; the names differ by trainer."""


class Progress:
    """One run's counters. A step: `forward` per micro-batch, `step_logged`, `wish`, maybe `saved`."""

    def __init__(
        self,
        config: TrainingConfig,
        schedule: Schedule,
        state: RunState,
        checkpoints: Checkpoints,
        callbacks: TrainingCallback,
        device: str,
    ) -> None:
        self.last_metrics: StepMetrics | None = None
        self.stopped: StopMode | None = None
        self._config = config
        self._schedule = schedule
        self._state = state
        self._checkpoints = checkpoints
        self._callbacks = callbacks
        self._device = device
        self._tokens = 0
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    def began(self) -> None:
        """Training starts now: loading and skipping rows is no part of the first step."""
        self._began = time.monotonic()

    def forward(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch is about to be run. Raises: RunStopped."""
        if self._callbacks.should_stop() == "stop":
            raise RunStopped("stop")
        self._tokens += sum(int(batch[name].sum()) for name in _MASKS if name in batch)

    def step_logged(self, step: int, logs: Mapping[str, float]) -> None:
        """An optimiser step is done and its loss known. Raises: TrainingFailedError."""
        loss, now = logs["loss"], time.monotonic()
        if not isfinite(loss):
            raise TrainingFailedError(
                f"The loss became {loss} in step {step}. Lower learning_rate "
                f"(now {self._config.learning_rate:g}) or use precision 'bf16' or 'fp32'."
            )
        self._recent.append((now - self._began, self._tokens))
        self._state.step, self._state.train_loss = step, loss
        self._state.trained_tokens += self._tokens
        self._began, self._tokens = now, 0
        self.last_metrics = self._metrics(logs["learning_rate"])
        self._callbacks.on_step(self.last_metrics)

    def wish(self) -> StopMode | None:
        """What is to happen after this step. Raises: RunStopped."""
        wish = self._callbacks.should_stop()
        if wish == "stop":
            raise RunStopped(wish)
        if wish and self._state.step < self._schedule.total_steps:
            self.stopped = wish
        return wish

    def saved(self, path: Path) -> None:
        """The trainer has written a checkpoint: from now on it counts."""
        self._checkpoints.seal(path, self._state)
        self._checkpoints.keep_newest(self._config.save_total_limit)
        self._callbacks.on_checkpoint(CheckpointInfo(self._state.step, path, self._state.train_loss))
        self._began = time.monotonic()

    def _metrics(self, rate: float) -> StepMetrics:
        seconds = sum(seconds for seconds, _ in self._recent)
        step = self._state.step
        return StepMetrics(
            step=step,
            total_steps=self._schedule.total_steps,
            loss=self._state.train_loss or 0.0,
            lr=rate,
            tokens_per_second=sum(tokens for _, tokens in self._recent) / max(seconds, 1e-9),
            eta_s=(self._schedule.total_steps - step) * seconds / len(self._recent),
            epoch=self._schedule.epoch_of(step),
            peak_memory_bytes=peak_memory_bytes(self._device),
            trained_tokens=self._state.trained_tokens,
        )
