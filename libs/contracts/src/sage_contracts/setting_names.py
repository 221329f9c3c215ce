"""The names of the training settings, and which one a wrong name may mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sage_contracts.config import LoRAConfig, TrainingConfig

_ELSEWHERE = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "warmup": "warmup_ratio",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
}
"""What other programs call some of them: the nearest name by its letters would be another one."""


def no_such_setting(name: str, known: Sequence[str] = ()) -> str:
    """What to say of a name that no setting has (`lora.rank`): the nearest that one has, else all of them.

    `known`: those that may be named; default: all.
    """
    known = known or [*TrainingConfig.model_fields, *(f"lora.{field}" for field in LoRAConfig.model_fields)]
    usual = _ELSEWHERE.get(name, "")
    near = [usual] if usual in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]!r}?" if near else f"The settings are: {', '.join(known)}."
    return f"There is no training setting {name!r}. {advice}"
