"""How long a text the base model was made for, as its config.json says. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "context_length")


def positions_of(base: Path) -> int | None:
    """Tokens; None where the config sets no end, or there is none."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    nested = config.get("text_config")  # of models that take pictures too
    parts = [config, nested] if isinstance(nested, dict) else [config]
    return next((found for part in parts if (found := _positions(part)) is not None), None)


def beyond_positions(longest: int, positions: int | None) -> str:
    """What to say of rows with up to `longest` tokens; empty where the model takes them."""
    if positions is None or longest <= positions:
        return ""
    return (
        f"Rows have up to {longest:,} tokens and the base model was made for {positions:,} "
        f"(max_position_embeddings): what lies behind them may teach it nothing, or harm it. Set max_length="
        f"{positions}, or choose a base model for longer texts"
    )


def _positions(config: dict[str, Any]) -> int | None:
    for name in _NAMES:
        if isinstance(stated := config.get(name), int):
            return max(stated, *map(int, _scaled(config, stated)), 0)
    return None


def _scaled(config: dict[str, Any], stated: int) -> Iterator[float]:
    """Reaches of scaled rotary embeddings; `stated` holds them already in some models' files, but not in all.

    Source: transformers' modeling_rope_utils; `rope_scaling` is its name before version 5.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return
    # Some models have one for each kind of layer.
    for one in (scaling, *(value for value in scaling.values() if isinstance(value, dict))):
        factor, original = one.get("factor"), one.get("original_max_position_embeddings", stated)
        if isinstance(factor, int | float) and isinstance(original, int):
            yield factor * original
