"""Low-rank adapters on frozen layers that read the same input, and their gradients, by torch's operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DRAWS = 1 << 16
"""What dropout decides by is one of so many."""


@dataclass(frozen=True)
class Adapter:
    """y[:, outputs] += scaling * (x @ a.T) @ b.T; a (rank, in), b (out, rank)."""

    a: Any
    b: Any
    scaling: float
    outputs: slice
    ranks: slice
    """Where its rank lies among those of its group."""


@dataclass(frozen=True)
class Dropped:
    """What dropout left of an input."""

    seen: Any
    """(tokens, in) True where an element survived; None: all did."""
    scale: float
    """What survived counts for so much more."""


def draw(x: Any, dropped: int) -> Any:
    """(tokens, in) True where an element of x survives dropout, which takes `dropped` of 65,536."""
    import torch

    # 16 random bits for each: a quarter of the time that `bernoulli_` takes.
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    return (bits.view(torch.int16)[: x.numel()] >= dropped - DRAWS // 2).view_as(x)


def adapt(x: Any, outs: int, adapters: Sequence[Adapter], dropped: Dropped) -> tuple[Any, Any]:
    """(what the adapters make of x (tokens, in), (tokens, outs); what `adapt_backward` wants again)."""
    narrow = _seen(x, dropped) @ _down(adapters, x.dtype).t()
    return narrow @ _up(adapters, dropped, outs, x.dtype).t(), narrow


def adapt_backward(
    of_y: Any, x: Any, narrow: Any, adapters: Sequence[Adapter], dropped: Dropped, of_x: Any
) -> list[Any]:
    """Gradients of each adapter's a and b in turn; that of x is added to `of_x`, unless that is None."""
    of_narrow = of_y @ _up(adapters, dropped, of_y.shape[1], of_y.dtype)
    of_down = of_narrow.t() @ _seen(x, dropped)
    # This way round the long dimension is the fast one.
    of_up = (narrow.t() @ of_y).t()
    found: list[Any] = []
    for adapter in adapters:
        of_b = of_up[adapter.outputs, adapter.ranks].to(adapter.b.dtype)
        found += [of_down[adapter.ranks].to(adapter.a.dtype), of_b * (adapter.scaling * dropped.scale)]
    if of_x is not None:
        if dropped.seen is None:
            of_x.addmm_(of_narrow, _down(adapters, of_x.dtype))
        else:
            of_x += (of_narrow @ _down(adapters, of_x.dtype)).mul_(dropped.seen)
    return found


def _seen(x: Any, dropped: Dropped) -> Any:
    """x as the adapters see it."""
    from torch import where

    return x if dropped.seen is None else where(dropped.seen, x, 0.0)


def _down(adapters: Sequence[Adapter], dtype: Any) -> Any:
    from torch import cat

    return cat([adapter.a for adapter in adapters]).to(dtype)


def _up(adapters: Sequence[Adapter], dropped: Dropped, outs: int, dtype: Any) -> Any:
    """(outs, all ranks): every B, scaled, at its outputs and ranks."""
    joint = adapters[0].b.new_zeros(outs, adapters[-1].ranks.stop)
    for adapter in adapters:
        joint[adapter.outputs, adapter.ranks] = adapter.b * (adapter.scaling * dropped.scale)
    return joint.to(dtype)
