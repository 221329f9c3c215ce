"""Which adapters an engine loads as they are. What it would load wrongly counts as what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sage_contracts.adapter_starts import start_in_the_base

Kind = Literal["vllm", "transformers"]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What it accepts as the largest rank of an engine."""
_NAMES: dict[Kind, str] = {"vllm": "vLLM", "transformers": "the transformers engine"}
# Each changes more than what two small matrices add to a layer. Source: vLLM, `vllm/lora/peft_helper.py`;
# trained tokens it passes over without a word.
_NOT_IN_VLLM = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}


def why_not(config: Mapping[str, Any], kind: Kind) -> str | None:
    """Why that engine cannot take an adapter with this `adapter_config.json`; None when it can."""
    # peft writes these into the base itself, where they would change every other model's answers; vLLM takes
    # neither.
    found = ["biases"] if config.get("bias", "none") != "none" else []
    if (start := start_in_the_base(config)) is not None:
        found.append(f"init_lora_weights={start}")
    if kind == "vllm":
        found += [name for key, name in _NOT_IN_VLLM.items() if config.get(key)]
        if (rank := largest_rank(config)) > VLLM_RANKS[-1]:
            found.append(f"rank {rank}")
    if not found:
        return None
    return f"{_NAMES[kind]} cannot load an adapter with {', '.join(dict.fromkeys(found))}"


def largest_rank(config: Mapping[str, Any], otherwise: int = 0) -> int:
    """Over all layers; `otherwise` where the file names none."""
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=otherwise)
