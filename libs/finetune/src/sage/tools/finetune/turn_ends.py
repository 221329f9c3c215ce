"""The tokens that end an answer: those its base stops at, and those a run taught it to end its turns with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

META_FIELD = "turn_end_ids"
"""Of finetune_meta.json: token ids."""
_GENERATION_CONFIG = "generation_config.json"


def with_turn_ends(eos: int | list[int] | None, ends: Sequence[int]) -> int | list[int] | None:
    """A generation config's `eos_token_id` with more ids; as it was where it has them all."""
    known = [eos] if isinstance(eos, int) else list(eos or [])
    missing = [end for end in ends if end not in known]
    return [*known, *missing] if missing else eos


def taught_turn_ends(folder: Path) -> list[int]:
    """What the run that wrote these weights recorded; nothing for older runs and for others' weights."""
    try:
        found = json.loads((folder / "finetune_meta.json").read_text(encoding="utf-8"))[META_FIELD]
    except (OSError, ValueError, KeyError):
        return []
    return list(found)


def generation_settings(base: Path, config: dict[str, Any], ends: Sequence[int]) -> dict[str, Any]:
    """The base's generation_config.json, with more ends; `config` is what transformers reads without one."""
    try:
        stored = json.loads((base / _GENERATION_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        stored = {name: config[name] for name in special if config.get(name) is not None}
    return {**stored, "eos_token_id": with_turn_ends(stored.get("eos_token_id"), ends)}
