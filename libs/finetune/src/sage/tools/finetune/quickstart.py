"""How much of a preset a quickstart runs: enough to see it learn, little enough to wait for. No torch."""

from __future__ import annotations

from typing import Any

from sage_contracts.config import PresetName, Task


def quickstart_overrides(task: Task | str, preset: PresetName | str) -> dict[str, Any]:
    """Sparse TrainingConfig fields to lay over the preset.

    Raises: ValueError for an unknown task or preset.
    """
    Task(task)
    if PresetName(preset) is PresetName.CPU:
        return {"max_steps": 24, "max_eval_rows": 32, "save_steps": 12}
    return {"max_steps": 200, "max_eval_rows": 128}
