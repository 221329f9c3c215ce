"""How a LoRA adapter was started, as far as it says on which base it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# All others take what they start with out of the base, in memory only. Source: peft, `tuners/lora/layer.py`.
_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")


def start_in_the_base(config: Mapping[str, Any]) -> str | None:
    """Of an `adapter_config.json`: the start that changed the base, so that the plain one is another model.

    None when the adapter belongs on its plain base.
    """
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower() not in _BESIDE_THE_BASE else None
