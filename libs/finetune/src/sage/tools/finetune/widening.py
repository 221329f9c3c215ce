"""Frozen weights that stay in the half precision they are stored in while everything is computed in fp32.

A bf16 is the upper half of an fp32, so that nothing is lost or added where a product widens what it reads.
Products in C do so block by block; held twice as wide, weights would be most of what a run on a CPU holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from sage.tools.finetune.step_kernels import StepKernels, TorchKernels, kernels_for, multiplies_halves

_is_by_torch = ContextVar("is_by_torch", default=False)


def widen_when_used(model: Any) -> set[int]:
    """Have layers of a model that is to be fused give fp32 whatever their weights are in.

    Returns the ids of the weights that may stay in bf16 so. Others, of sizes that products in C are not for,
    are better widened once. Layers stay the same objects: what holds them, or shares their weights, need not
    know.
    """
    from torch import bfloat16

    kinds, kept = _kinds(), set()
    dims = {module.head_dim for module in model.modules() if hasattr(module, "head_dim")}
    if not all(multiplies_halves(head_dim=dim) for dim in dims):
        return set()
    for module in model.modules():
        is_half = type(module) in kinds and module.weight.dtype == bfloat16
        if is_half and multiplies_halves(*module.weight.shape):
            module.__class__ = kinds[type(module)]
            kept.add(id(module.weight))
    return kept


def is_plain_linear(module: Any) -> bool:
    """Whether it does nothing but multiply with its weights, and add its bias."""
    from torch.nn import Linear

    return type(module) in (Linear, _kinds()[Linear])


@contextmanager
def by_torch() -> Iterator[None]:
    """Forward passes inside multiply by torch, and so does the way back from them.

    What products in C are compared with must not come from the same products.
    """
    token = _is_by_torch.set(True)
    try:
        yield
    finally:
        _is_by_torch.reset(token)


def computing_dtype(model: Any) -> Any:
    """What a model computes in, which may be wider than its weights."""
    from torch import float32

    is_widened = type(model.get_input_embeddings()) in _kinds().values()
    return float32 if is_widened else model.dtype


@cache
def _kinds() -> dict[type, type]:
    """Made on first use, so that importing this module costs no torch."""
    from torch.nn import Embedding, Linear

    class WideningLinear(Linear):  # type: ignore[misc] # torch is untyped here
        def forward(self, x: Any) -> Any:
            y = _times_frozen()(x.flatten(0, -2).contiguous(), self.weight)
            y = y.unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias

    class WideningEmbedding(Embedding):  # type: ignore[misc]
        def forward(self, ids: Any) -> Any:
            return super().forward(ids).float()

    return {Linear: WideningLinear, Embedding: WideningEmbedding}


@cache
def _times_frozen() -> Callable[..., Any]:
    import torch

    class TimesFrozen(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.save_for_backward(weight)
            ctx.kernels = _kernels(x, weight)
            return ctx.kernels.product(x, weight)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (weight,) = ctx.saved_tensors
            return ctx.kernels.product(upstream[0].contiguous(), weight.t()), None

    return TimesFrozen.apply  # type: ignore[no-any-return]


def _kernels(x: Any, weight: Any) -> StepKernels:
    return TorchKernels() if _is_by_torch.get() else kernels_for(x.device, x.dtype, *weight.shape)
