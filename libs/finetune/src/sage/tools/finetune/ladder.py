"""What a run changes, one thing at a time, when memory does not suffice. Pure functions of config and chip.

The effective batch is always kept, so the course of training stays the same; rows are only cut if the config
allows it. A run is described by its config and the rungs it has taken: applying the same rungs to the same
config always gives the same result, so a list of names is all that has to be remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from sage.tools.finetune.hardware import resolve_precision
from sage_contracts.config import OomRung, TrainingConfig

LEAST_HARM: tuple[OomRung, ...] = (
    "halve_batch",
    "gradient_checkpointing",
    "load_in_8bit",
    "load_in_4bit",
    "halve_max_length",
)
"""First what costs only time, then what costs the base's precision, then what costs parts of rows."""
PUBLISHED: tuple[OomRung, ...] = (
    "load_in_8bit",
    "load_in_4bit",
    "halve_max_length",
    "halve_batch",
    "gradient_checkpointing",
    "smaller_rank",
)
"""The order of the product page."""

RESTARTING: frozenset[OomRung] = frozenset({"smaller_rank"})
"""Rungs that change the adapter's shape: no checkpoint from before fits."""

FOR_ADAPTERS: frozenset[OomRung] = frozenset({"load_in_8bit", "load_in_4bit", "smaller_rank"})
"""Rungs that need a frozen base: not for a run that trains every weight."""

SHORTEST_MAX_LENGTH = 128  # tokens; few rows keep an answer below this
SMALLEST_RANK = 4
CPU_TOKEN_BUDGET = {"fp32": 768, "fp16": 1024, "bf16": 1024}
"""Tokens per forward pass on a CPU, by the format of activations: more are little faster, and cost memory."""


@dataclass(frozen=True)
class Rung:
    """One remedy, and what it makes of the config."""

    name: OomRung
    change: str
    """The settings before and after, for people."""
    config: TrainingConfig


def token_budget(config: TrainingConfig, device: str, taken: Sequence[OomRung] = ()) -> int:
    """Tokens per forward pass: what the batch size allows at full length; less on a CPU.

    A longer row always goes alone, so 1 means row by row: the least there is, once the batch was halved to 1.
    """
    if "halve_batch" in taken and config.per_device_train_batch_size == 1:
        return 1
    allowed = config.per_device_train_batch_size * config.max_length
    if device != "cpu":
        return allowed
    precision, _ = resolve_precision(config.precision, device)
    return min(allowed, CPU_TOKEN_BUDGET[precision])


def fewest_at_once(config: TrainingConfig) -> int:
    """The rows that a forward pass of training cannot do without; they divide the effective batch.

    KTO needs two or more, for their answers to be swapped.
    """
    fewest = 2 if config.method == "kto" else 1
    rows = config.effective_batch_size
    return next((size for size in range(fewest, rows + 1) if rows % size == 0), rows)


def order_of(config: TrainingConfig) -> tuple[OomRung, ...]:
    """The rungs that the config asks for, in its order."""
    if isinstance(config.oom_ladder, list):
        return tuple(config.oom_ladder)
    return {"least_harm": LEAST_HARM, "published": PUBLISHED, "off": ()}[config.oom_ladder]


def next_rung(
    config: TrainingConfig, taken: Sequence[OomRung] = (), *, device: str = "cpu", can_quantise: bool = True
) -> Rung | None:
    """The next remedy that changes something; None at the ladder's end.

    `config` is the one of now: as asked for, with `taken` applied to it.
    """
    for name in order_of(config):
        if name in ("load_in_8bit", "load_in_4bit") and (not can_quantise or config.distributed == "fsdp"):
            continue  # packed weights cannot be cut up
        if name == "load_in_8bit" and config.lora.use_dora and device == "cpu":
            continue  # of such weights peft cannot compute DoRA's norms there
        if name in FOR_ADAPTERS and config.tuning == "full":
            continue
        found = _REMEDIES[name](config, taken, device)
        if found:
            changed = _with(config, found)
            return Rung(name, _change(config, changed), changed)
    return None


def climbed(
    config: TrainingConfig, taken: Sequence[OomRung], *, device: str = "cpu"
) -> tuple[TrainingConfig, tuple[Rung, ...]]:
    """(the config after these rungs, each of them with what it changed)."""
    rungs: list[Rung] = []
    for index, name in enumerate(taken):
        changed = _with(config, _REMEDIES[name](config, taken[:index], device) or {})
        rungs.append(Rung(name, _change(config, changed), changed))
        config = changed
    return config, tuple(rungs)


def _halve_batch(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    if config.method != "sft":
        return _halve_rows(config)
    budget = token_budget(config, device, taken)
    if budget == 1:
        return None
    effective = config.effective_batch_size
    # Of the sizes that divide the effective batch, the largest that really halves a forward pass: a CPU's
    # budget may have cut it below the batch already.
    fitting = (
        size
        for size in range(config.per_device_train_batch_size - 1, 0, -1)
        if effective % size == 0 and size * config.max_length <= budget // 2
    )
    return _split(effective, next(fitting, 1))


def _halve_rows(config: TrainingConfig) -> dict[str, Any] | None:
    # Runs on preferences take rows as they are told, whatever their tokens.
    size, effective = config.per_device_train_batch_size, config.effective_batch_size
    fewest = fewest_at_once(config)
    if size <= fewest:
        return None
    fitting = (half for half in range(size // 2, fewest, -1) if effective % half == 0)
    return _split(effective, next(fitting, fewest))


def _split(effective: int, size: int) -> dict[str, Any]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": effective // size}


def _checkpointing(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    return None if config.gradient_checkpointing else {"gradient_checkpointing": True}


def _8bit(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    is_quantised = config.load_in_8bit or config.load_in_4bit
    return None if is_quantised else {"load_in_8bit": True}


def _4bit(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    return None if config.load_in_4bit else {"load_in_8bit": False, "load_in_4bit": True}


def _shorter(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    if not config.oom_may_truncate or config.max_length <= SHORTEST_MAX_LENGTH:
        return None
    return {"max_length": max(SHORTEST_MAX_LENGTH, config.max_length // 2)}


def _smaller_rank(config: TrainingConfig, taken: Sequence[OomRung], device: str) -> dict[str, Any] | None:
    lora = config.lora
    if lora.r <= SMALLEST_RANK:
        return None
    # What the adapter's output is scaled by (alpha / r; with rsLoRA alpha / √r): the learning rate still
    # fits when it stays.
    share = SMALLEST_RANK / lora.r
    alpha = max(1, round(lora.lora_alpha * (sqrt(share) if lora.use_rslora else share)))
    return {"lora": {**lora.model_dump(), "r": SMALLEST_RANK, "lora_alpha": alpha}}


_Remedy = Callable[[TrainingConfig, Sequence[OomRung], str], dict[str, Any] | None]
_REMEDIES: dict[OomRung, _Remedy] = {
    "halve_batch": _halve_batch,
    "gradient_checkpointing": _checkpointing,
    "load_in_8bit": _8bit,
    "load_in_4bit": _4bit,
    "halve_max_length": _shorter,
    "smaller_rank": _smaller_rank,
}


def _with(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    return TrainingConfig.model_validate({**config.model_dump(), **changes})


def _change(before: TrainingConfig, after: TrainingConfig) -> str:
    old, new = _flat(before), _flat(after)
    changes = [f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name]]
    return ", ".join(changes) or "one row at a time"


def _flat(config: TrainingConfig) -> dict[str, Any]:
    fields = config.model_dump()
    lora = fields.pop("lora")
    return fields | {f"lora.{name}": value for name, value in lora.items()}
