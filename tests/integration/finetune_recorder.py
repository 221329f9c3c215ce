"""A callback that remembers what a run told it, and wishes it to stop after a step."""

from __future__ import annotations

from typing import Literal

from sage.tools.finetune import CheckpointInfo, Evaluation, StepMetrics, TrainingCallback


class Recorder(TrainingCallback):
    def __init__(self, stop_after: int = 0, mode: Literal["save_and_stop", "stop"] = "save_and_stop") -> None:
        self.phases: list[str] = []
        self.steps: list[StepMetrics] = []
        self.checkpoints: list[CheckpointInfo] = []
        self.evals: dict[str, float] = {}
        self.logs: list[tuple[str, str]] = []
        self._stop_after, self._mode = stop_after, mode

    def on_phase(self, name: str, detail: str) -> None:
        self.phases.append(name)

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_checkpoint(self, checkpoint: CheckpointInfo) -> None:
        self.checkpoints.append(checkpoint)

    def on_eval(self, evaluation: Evaluation) -> None:
        self.evals[evaluation.name] = evaluation.loss

    def on_log(self, level: str, message: str) -> None:
        self.logs.append((level, message))

    def should_stop(self) -> Literal["save_and_stop", "stop"] | None:
        return self._mode if self._stop_after and len(self.steps) >= self._stop_after else None
