"""How much of a preset a quickstart runs: enough to see it learn, little enough to wait for. No torch."""

from __future__ import annotations

from typing import Any

from sage_contracts.config import Method, PresetName, Task

# About 25,000 tokens: some two minutes on two cores. Few steps want a high rate: the small base's held-out
# loss of 2.394 fell to 2.298 at 2e-4 (with twice the rows), to 2.149 at 1e-3 and to 2.116 at this one.
_CPU: dict[str, Any] = {
    "max_steps": 32,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "max_eval_rows": 32,
    "save_steps": 16,
}


# A preset that is made for a GPU keeps its batch and its rate, and costs a CPU more than its own.
_OF_ANOTHER_PRESET_ON_A_CPU = ("max_steps", "max_eval_rows", "save_steps")


def quickstart_overrides(
    task: Task | str, preset: PresetName | str, method: Method = "sft", *, has_gpu: bool
) -> dict[str, Any]:
    """Sparse TrainingConfig fields to lay over the preset; has_gpu: whether the machine that trains has one.

    Raises: ValueError for an unknown task or preset.
    """
    Task(task)
    if PresetName(preset) is PresetName.CPU:
        # Preferences are learned at the preset's own rate: ten times that drives a model off its base.
        left_out = () if method == "sft" else ("learning_rate",)
        return {name: value for name, value in _CPU.items() if name not in left_out}
    if not has_gpu:
        return {name: _CPU[name] for name in _OF_ANOTHER_PRESET_ON_A_CPU}
    return {"max_steps": 200, "max_eval_rows": 128}
