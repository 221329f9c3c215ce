"""What must hold of a model before its rows may lie end to end: each is what it would be alone.

A loss over some rows does not show all of it. What one row does to the next is a part of a part of the sum,
and a cap on logits changes small ones little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from sage.tools.finetune.losses import PackedLoss
from sage.tools.finetune.prefix_tree import SHORTEST_SHARED
from sage.tools.finetune.rendering import Sample

SAME_LOGITS = 1e-5  # relative; a head that is all there is gives the very same
BY_LENGTH = {"dynamic", "longrope"}  # rotations whose angles depend on the longest row of a pass
PIECE_TOKENS = 32


def require_own_angles(config: Any, rows: Sequence[Sample]) -> None:
    """Raises: ValueError where one long row would turn the others of its pass differently."""
    limits = [
        rope.get("original_max_position_embeddings") or config.max_position_embeddings
        for rope in _rotations(config)
        if rope.get("rope_type") in BY_LENGTH
    ]
    if limits and (longest := max(len(row.ids) for row in rows)) > min(limits):
        raise ValueError(f"its rotations change beyond {min(limits)} tokens, and a row has {longest}")


def _rotations(config: Any) -> Iterator[dict[str, Any]]:
    """One for all layers, or one for each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    parts = [found] if "rope_type" in found else found.values()
    yield from (part for part in parts if isinstance(part, dict))


def require_plain_head(causal: Any, row: Sample) -> None:
    """Raises: ValueError where logits are more than the output layer makes of the last hidden states."""
    import torch

    ids = torch.tensor([list(row.ids)], device=causal.device)
    with torch.no_grad():
        whole = causal(input_ids=ids, use_cache=False).logits.float()
        hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        alone = causal.get_output_embeddings()(hidden).float()
    if not _difference(alone, whole) <= SAME_LOGITS:
        raise ValueError("its logits are more than its output layer gives, capped or scaled")


def require_rows_apart(packed: PackedLoss, rows: Sequence[Sample], tolerance: float) -> None:
    """Compare a row's hidden states behind one neighbour with those behind another of the same length.

    Attention keeps rows apart, and layers that hand on a state from token to token do not. All begin alike,
    since what rows share has neighbours too. `tolerance` is relative. Raises: ValueError.
    """
    import torch

    known = sorted({token for row in rows for token in row.ids})
    *others, last = known
    if len(others) < 2:
        return  # rows of two tokens have no neighbours that differ
    start = list(rows[0].ids[:SHORTEST_SHARED])
    # Rows lie in the order of their tokens: this one is behind all others.
    watched = [*start, last, *islice(cycle(known), PIECE_TOKENS)]
    neighbours = [[*start, *islice(cycle(others[turn:] + others[:turn]), PIECE_TOKENS)] for turn in (0, 1)]
    with torch.no_grad():
        seen = [
            # A neighbour's states are first, one for each of its labels: what predicts none is not computed.
            packed.at_labels([Sample(ids, ids), Sample(watched, watched)])[0][len(ids) - 1 :].float()
            for ids in neighbours
        ]
    if not (off := _difference(*seen)) <= tolerance:
        raise ValueError(f"what precedes a row changes it by {off:.1%}, though attention keeps them apart")


def _difference(found: Any, wanted: Any) -> float:
    """Relative. NaN where either has one."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
