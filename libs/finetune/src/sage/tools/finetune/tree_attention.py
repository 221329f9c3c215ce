"""Attention over rows whose common beginnings lie in the sequence once, with its gradient, on a CPU.

Every segment of the tree attends to itself, and all that goes on from it attends to it as a whole. Softmax
over several pieces comes out exact from what each gives and the logarithm of its sum, blockwise as in
https://arxiv.org/abs/2310.01889; backwards, each piece needs only the sum over all of them.

All in fp32: in half precision torch's kernel is slower, and keeps a kernel for every length it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage.tools.finetune.prefix_tree import Segment


def attention(qkv: Any, kv_heads: int, segments: Sequence[Segment], scaling: float) -> tuple[Any, Any]:
    """(what queries attend to (tokens, heads, dim), the logarithms of their sums (tokens, heads) in fp32).

    qkv (tokens, heads + 2 * kv_heads, dim) holds queries, then keys, then values. `attention_backward` wants
    both results.
    """
    import torch

    query, key, value = _split(qkv.float(), kv_heads)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found, sums = torch.empty_like(query), query.new_empty(query.shape[:2])
    for start, stop, _ in segments:
        own = slice(start, stop)
        part, log_sum = attend(*_heads_first(own, query, key, value), 0.0, True, scale=scaling)
        found[own], sums[own] = part[0].transpose(0, 1), log_sum[0].t()
    for start, stop, end in segments:
        if end > stop:
            whole, after = _heads_first(slice(start, stop), key, value), slice(stop, end)
            part, log_sum = attend(*_heads_first(after, query), *whole, 0.0, False, scale=scaling)
            other = log_sum[0].t()
            share = torch.sigmoid(other - sums[after])
            found[after].lerp_(part[0].transpose(0, 1), share[..., None])
            torch.logaddexp(sums[after], other, out=sums[after])
    return found.to(qkv.dtype), sums


def attention_backward(
    upstream: Any,
    qkv: Any,
    kv_heads: int,
    attended: Any,
    sums: Any,
    segments: Sequence[Segment],
    scaling: float,
) -> Any:
    """The gradient of `qkv`, in fp32. Shapes as in `attention`."""
    from torch import empty_like, ops

    upstream, qkv, attended = (part.float() for part in (upstream, qkv, attended))
    of_joined = empty_like(qkv)
    (query, key, value), (of_query, of_key, of_value) = (_split(part, kv_heads) for part in (qkv, of_joined))
    attend_backward = ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def backward(queries: slice, keys: slice, *, is_causal: bool) -> tuple[Any, ...]:
        seen = _heads_first(keys, key, value)
        wanted, asking, given = _heads_first(queries, upstream, query, attended)
        log_sum = sums[queries].t()[None]
        parts = attend_backward(wanted, asking, *seen, given, log_sum, 0.0, is_causal, scale=scaling)
        return tuple(part[0].transpose(0, 1) for part in parts)

    for start, stop, _ in segments:
        own = slice(start, stop)
        of_query[own], of_key[own], of_value[own] = backward(own, own, is_causal=True)
    for start, stop, end in segments:
        if end > stop:
            whole, after = slice(start, stop), slice(stop, end)
            parts = backward(after, whole, is_causal=False)
            for target, part in zip((of_query[after], of_key[whole], of_value[whole]), parts, strict=True):
                target += part
    return of_joined


def _split(qkv: Any, kv_heads: int) -> Any:
    """Queries, keys and values."""
    return qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)


def _heads_first(part: slice, *tensors: Any) -> list[Any]:
    """(tokens, heads, dim) as (1, heads, tokens of the part, dim)."""
    return [tensor[part].transpose(0, 1)[None] for tensor in tensors]
