"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

from math import ceil, cos, pi


def rate_factor(kind: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of the peak rate that update `step` (from 0) runs at.

    The warm-up rises to 1 without starting at 0: an update at rate 0 would be a step thrown away.
    """
    warmup = ceil(total_steps * warmup_ratio) if kind != "constant" else 0
    if step < warmup:
        return (step + 1) / warmup
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + cos(pi * done))
