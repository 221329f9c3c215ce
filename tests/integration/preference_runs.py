"""Runs on preferences that tests of several files share: their settings, their rows, and who watches them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.integration.finetune_recorder import Recorder

from sage.tools.finetune import Evaluation, TrainingConfig
from sage.tools.finetune.callbacks import GeneratedAnswer

METHODS = ("dpo", "orpo", "kto")


class Watcher(Recorder):
    """Remembers every evaluation between steps."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__(stop_after)
        self.between: list[tuple[int, float, bool]] = []
        self.answers: list[tuple[int, str, str]] = []

    def on_eval(self, evaluation: Evaluation) -> None:
        super().on_eval(evaluation)
        if evaluation.name == "step":
            self.between.append((evaluation.step, evaluation.loss, evaluation.is_best))

    def on_answers(self, step: int, answers: Sequence[GeneratedAnswer]) -> None:
        self.answers += [(step, one.prompt, one.answer) for one in answers]


def write_pairs(path: Path, count: int = 30) -> Path:
    rows = [{"prompt": f"Number {n}?", "chosen": "Yes please.", "rejected": "no NO no"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(base: Path, data: Path, output: Path, **changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model_name": str(base),
        "data_path": str(data),
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "save_steps": 2,
        "max_length": 128,
    }
    return TrainingConfig.model_validate({**fields, **changes})
