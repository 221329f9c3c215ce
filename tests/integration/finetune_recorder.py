"""What tests of whole runs look at: what a run told its callbacks, and the weights it left."""

from __future__ import annotations

from typing import Any, Literal

from sage.tools.finetune import CheckpointInfo, Evaluation, StepMetrics, TrainingCallback, TrainResult


class Recorder(TrainingCallback):
    """Remembers what it is told; wishes to stop after a step."""

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


def adapter_weights(result: TrainResult) -> dict[str, Any]:
    """The tensors of the adapter that a run has written."""
    from safetensors.torch import load_file

    assert result.adapter_dir is not None
    return dict(load_file(result.adapter_dir / "adapter_model.safetensors"))
