"""What is said of a model when its job has ended."""

from __future__ import annotations

import pytest

from sage_cli.jobs.outcome import has_become_worse, settings_rows
from sage_contracts.config import LoRAConfig, TrainingConfig
from sage_contracts.jobs import JobMetrics


@pytest.mark.parametrize(
    ("base", "tuned", "is_worse"),
    [(2.0, 1.7, False), (2.9, 10.5, True), (2.0, 2.0, False), (None, 1.0, False), (2.0, None, False)],
)
def test_a_model_that_learned_by_heart_is_told_from_one_that_learned(
    base: float | None, tuned: float | None, is_worse: bool
) -> None:
    assert has_become_worse(JobMetrics(base_eval_loss=base, eval_loss=tuned)) is is_worse


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (
            TrainingConfig(precision="bf16"),
            {
                "adapters": "LoRA r=8, alpha 16, dropout 0.05 on q_proj, k_proj, v_proj, o_proj",
                "precision": "bf16, base not quantised",
                "row length": "at most 1024 tokens",
            },
        ),
        (
            TrainingConfig(
                load_in_4bit=True,
                gradient_checkpointing=True,
                lora=LoRAConfig(target_modules="all-linear", use_rslora=True, loraplus_lr_ratio=16),
            ),
            {
                "adapters": "LoRA r=8, alpha 16, dropout 0.05 on all-linear, rsLoRA, LoRA+ ratio 16",
                "precision": "auto, base in 4-bit nf4, gradient checkpointing",
            },
        ),
        (TrainingConfig(load_in_8bit=True), {"precision": "auto, base in 8-bit"}),
        (
            TrainingConfig(tuning="full", gradient_checkpointing=True),
            {"adapters": "none: all weights train", "precision": "auto, gradient checkpointing"},
        ),
    ],
)
def test_the_settings_that_a_run_stands_on_are_told(config: TrainingConfig, rows: dict[str, str]) -> None:
    assert rows.items() <= dict(settings_rows(config)).items()
