"""SAGE Finetune's training engine. Importing the package costs no torch: names are loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage.tools.finetune.callbacks import (
        CheckpointInfo,
        ConsoleProgress,
        Evaluation,
        GeneratedAnswer,
        StepMetrics,
        TrainingCallback,
    )
    from sage.tools.finetune.plan_types import Plan
    from sage.tools.finetune.planning import plan
    from sage.tools.finetune.trainer import LoRATrainer, TrainResult
    from sage_contracts.config import LoRAConfig, PresetConfigs, PresetName, Task, TrainingConfig

__all__ = [
    "CheckpointInfo",
    "ConsoleProgress",
    "Evaluation",
    "GeneratedAnswer",
    "LoRAConfig",
    "LoRATrainer",
    "Plan",
    "PresetConfigs",
    "PresetName",
    "StepMetrics",
    "Task",
    "TrainResult",
    "TrainingCallback",
    "TrainingConfig",
    "plan",
]

_HOMES = {
    "CheckpointInfo": "sage.tools.finetune.callbacks",
    "ConsoleProgress": "sage.tools.finetune.callbacks",
    "Evaluation": "sage.tools.finetune.callbacks",
    "GeneratedAnswer": "sage.tools.finetune.callbacks",
    "StepMetrics": "sage.tools.finetune.callbacks",
    "TrainingCallback": "sage.tools.finetune.callbacks",
    "Plan": "sage.tools.finetune.plan_types",
    "plan": "sage.tools.finetune.planning",
    "LoRATrainer": "sage.tools.finetune.trainer",
    "TrainResult": "sage.tools.finetune.trainer",
    "LoRAConfig": "sage_contracts.config",
    "PresetConfigs": "sage_contracts.config",
    "PresetName": "sage_contracts.config",
    "Task": "sage_contracts.config",
    "TrainingConfig": "sage_contracts.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
