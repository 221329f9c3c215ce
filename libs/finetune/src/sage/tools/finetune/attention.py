"""Attention over several rows laid end to end, each row seeing itself alone.

Packing rows into one sequence of shape (1, tokens) leaves no padding anywhere; only attention must keep them
apart. Kernels with variable lengths do that on some GPUs (see kernels.py), where the caller passes one; else
scaled_dot_product_attention is called per row, which is exact on every device and, with rows of hundreds of
tokens, as fast. What rows begin with in common lies in the sequence once (see prefix_tree.py): for attention
every row has its beginning back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage.tools.finetune.kernels import VarlenAttention

PACKED_ATTENTION = "sage_packed"


def register_packed_attention() -> None:
    """Make `PACKED_ATTENTION` known to transformers, with its own masks for whoever else calls the model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def no_mask(device: Any) -> Any:
    """What to pass as `attention_mask` with `row_lengths`, which say it all.

    A mask of four dimensions is taken for a finished one: none of (tokens, tokens) is made.
    """
    from torch import bool as boolean
    from torch import ones

    return ones(1, 1, 1, 1, dtype=boolean, device=device)


def packed_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    row_lengths: Sequence[int] | None = None,
    unfolded: Any = None,
    folded: Any = None,
    varlen: VarlenAttention | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unsupported: Any,
) -> tuple[Any, None]:
    """query (1, heads, tokens, dim), key and value (1, kv_heads, tokens, dim) -> (1, tokens, heads, dim).

    `unfolded`: where the rows' tokens lie, one row after the other, if some are there once for several rows;
    `folded`: where all tokens lie among those.

    Without `row_lengths` (somebody generates with the model meanwhile) it is transformers' own attention.
    Raises: NotImplementedError for what this attention cannot do (the caller then trains row by row).
    """
    if row_lengths is None and attention_mask is not None and attention_mask.numel() == 1 < query.shape[2]:
        # The mask of `no_mask`, which hides nothing: every token would see those behind it.
        raise NotImplementedError("layers that do not hand on to attention where rows end")
    if row_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **unsupported
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if unsupported.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}")
    rows = list(row_lengths)
    kernel = None if dropout or query.dtype.itemsize > 2 else varlen
    if unfolded is None:
        return _attended(query, key, value, rows, kernel, dropout, scaling, sliding_window), None
    # By way of fp32: gradients of many rows add up in what they share, on GPUs one after the other.
    query, key, value = (
        part.float().index_select(2, unfolded).to(part.dtype) for part in (query, key, value)
    )
    attended = _attended(query, key, value, rows, kernel, dropout, scaling, sliding_window)
    return attended.index_select(1, folded), None


def _attended(
    query: Any,
    key: Any,
    value: Any,
    rows: list[int],
    varlen: VarlenAttention | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Any:
    """Each of the rows by itself: shapes as in `packed_attention`."""
    from torch import autocast, cat, ones
    from torch import bool as boolean
    from torch.nn.functional import scaled_dot_product_attention

    if varlen is not None:
        tokens_first = (part[0].transpose(0, 1) for part in (query, key, value))
        return varlen(*tokens_first, rows, scaling, window)[None]
    grouped = query.shape[1] != key.shape[1]
    dtype = query.dtype
    if query.device.type == "cpu":
        # oneDNN keeps a kernel for every row length it meets in half precision, and never lets go of it.
        query, key, value = query.float(), key.float(), value.float()
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped}
    windows = {
        length: ones(length, length, dtype=boolean, device=query.device).tril().triu(1 - window)
        for length in set(rows)
        if window is not None and length > window
    }
    pieces = zip(rows, query.split(rows, 2), key.split(rows, 2), value.split(rows, 2), strict=True)
    with autocast("cpu", enabled=False):  # which would make it half precision again
        parts = [
            scaled_dot_product_attention(
                q, k, v, attn_mask=windows.get(length), is_causal=length not in windows, **options
            )
            for length, q, k, v in pieces
        ]
    return cat(parts, dim=2).transpose(1, 2).to(dtype)
