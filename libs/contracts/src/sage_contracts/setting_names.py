"""The names of the training settings, and which one a wrong name may mean."""

from __future__ import annotations

import difflib

from sage_contracts.config import LoRAConfig, TrainingConfig


def no_such_setting(name: str) -> str:
    """What to say of a name that no setting has (`lora.rank`): the nearest that one has, else all of them."""
    known = [*TrainingConfig.model_fields, *(f"lora.{field}" for field in LoRAConfig.model_fields)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]!r}?" if near else f"The settings are: {', '.join(known)}."
    return f"There is no training setting {name!r}. {advice}"
