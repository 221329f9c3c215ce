"""Curves: TensorBoard, a JSONL file beside it, and Weights & Biases where it is asked for and installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sage.tools.finetune.callbacks import CallbackList, StepMetrics, TrainingCallback
from sage_contracts.config import TrainingConfig


class CurveWriter(TrainingCallback):
    """Writes below `<logs>/run-<time>`, one folder per run, so that versions do not share a curve."""

    def __init__(self, logs: Path, config: TrainingConfig, resumed_step: int) -> None:
        earlier = sorted(logs.glob("run-*")) if logs.is_dir() else []
        fresh = logs / f"run-{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = earlier[-1] if resumed_step and earlier else fresh
        self.folder.mkdir(parents=True, exist_ok=True)
        self._every = config.logging_steps
        self._lines = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _tensorboard(self.folder, resumed_step) if "tensorboard" in config.report_to else None
        self._wandb = _wandb(self.folder, config) if "wandb" in config.report_to else None
        self._step = resumed_step

    def on_step(self, metrics: StepMetrics) -> None:
        self._step = metrics.step
        if metrics.step % self._every and metrics.step != metrics.total_steps:
            return
        self._write(
            {
                "train/loss": metrics.loss,
                "train/learning_rate": metrics.lr,
                "train/tokens_per_second": metrics.tokens_per_second,
                "train/epoch": metrics.epoch,
            }
        )

    def on_eval(self, name: Literal["base", "tuned"], loss: float) -> None:
        # The base's loss is the tuned model's at step 0: one curve shows both.
        self._write({"eval/loss": loss})

    @property
    def has_wandb(self) -> bool:
        return self._wandb is not None

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, values: dict[str, float]) -> None:
        print(json.dumps({"step": self._step, **values}), file=self._lines, flush=True)
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, self._step)
            self._board.flush()  # people watch while it trains
        if self._wandb is not None:
            self._wandb.log(values, step=self._step)


@contextmanager
def curves(
    logs: Path, config: TrainingConfig, resumed_step: int, tell: TrainingCallback
) -> Iterator[CallbackList]:
    """`tell` with a curve writer beside it, closed at the end."""
    writer = CurveWriter(logs, config, resumed_step)
    if "wandb" in config.report_to and not writer.has_wandb:
        tell.on_log("warn", "wandb is not installed, so no run is sent there: pip install wandb")
    try:
        yield CallbackList((tell, writer))
    finally:
        writer.close()


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)


def _wandb(folder: Path, config: TrainingConfig) -> Any:
    try:
        import wandb  # type: ignore[import-not-found, unused-ignore] # optional
    except ImportError:
        return None
    return wandb.init(project="sage-finetune", dir=str(folder), config=config.model_dump(mode="json"))
