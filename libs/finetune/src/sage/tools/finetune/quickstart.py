"""How much of a preset a quickstart runs: enough to see it learn, little enough to wait for. No torch."""

from __future__ import annotations

from typing import Any

from sage_contracts.config import PresetName, Task

# About 25,000 tokens: two minutes on two idle cores. Few steps want a high rate; of 5e-4 to 4e-3 this one took the
# held-out loss of the small base furthest down.
_CPU: dict[str, Any] = {
    "max_steps": 32,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "max_eval_rows": 32,
    "save_steps": 16,
}


def quickstart_overrides(task: Task | str, preset: PresetName | str) -> dict[str, Any]:
    """Sparse TrainingConfig fields to lay over the preset.

    Raises: ValueError for an unknown task or preset.
    """
    Task(task)
    if PresetName(preset) is PresetName.CPU:
        return dict(_CPU)
    return {"max_steps": 200, "max_eval_rows": 128}
