"""Frozen linear layers that read the same input, computed as one, with the low-rank adapters on them.

Forward and backward are written out, so that nothing is kept which can be had again cheaply, and an adapter
costs a few thin products instead of a dozen small operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from sage.tools.finetune.low_rank import DRAWS, Adapter, Dropped
from sage.tools.finetune.step_kernels import StepKernels
from sage.tools.finetune.widening import is_plain_linear


class NotFusableError(Exception):
    """This module does more than the fused path computes."""


class Projections:
    """Several linear layers of one input as one product; their weights become views of the joint one."""

    def __init__(self, layers: Sequence[Any]) -> None:
        """Raises: NotFusableError."""
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        for base in bases:
            if not is_plain_linear(base) or base.weight.requires_grad:
                raise NotFusableError(f"{type(base).__name__} is not a frozen linear layer")
        self.weight = joined([base.weight for base in bases])
        self.bias = _joined_bias(bases)
        self.adapters: list[Adapter] = []
        rates = {_collect(layer, self.adapters, start) for layer, start in _starts(layers, bases)} - {None}
        if len(rates) > 1:
            raise NotFusableError("adapters of one input drop out at different rates")
        rate = rates.pop() or 0.0 if rates else 0.0
        self._dropped = min(round(rate * DRAWS), DRAWS - 1)

    @property
    def parameters(self) -> list[Any]:
        """What is trained, in the order that `backward` returns gradients in."""
        return [weight for adapter in self.adapters for weight in (adapter.a, adapter.b)]

    def without_adapters(self) -> Projections:
        """The frozen layers alone, their weights not held twice."""
        bare = copy(self)
        bare.adapters = []
        return bare

    def forward(
        self, kernels: StepKernels, x: Any, is_training: bool, added: Any = None
    ) -> tuple[Any, Any, Any]:
        """x (tokens, in) -> x @ weight.T + adapters + added, and two tensors or Nones for `backward`."""
        if not self.adapters:
            if self.bias is None:
                return kernels.product(x, self.weight, added), None, None
            y = kernels.product(x, self.weight, self.bias)
            return (y if added is None else y.add_(added)), None, None
        # Adapters go first, what is largest last: added to halves that were rounded already, parts smaller
        # than their last bit would be lost one and all, and not only now and then.
        seen = kernels.draw(x, self._dropped) if is_training and self._dropped else None
        y, narrow = kernels.adapt(x, len(self.weight), self.adapters, self._what_dropped(seen))
        kernels.product(x, self.weight, y, y)
        for more in (self.bias, added):
            if more is not None:
                y.add_(more)
        return y, seen, narrow

    def backward(
        self, kernels: StepKernels, gradient: Any, x: Any, seen: Any, narrow: Any, needs_input: bool
    ) -> tuple[Any, list[Any]]:
        """(gradient of x or None, gradients of `parameters`). `x` counts only where there are adapters."""
        of_x = kernels.product(gradient, self.weight.t()) if needs_input else None
        if not self.adapters:
            return of_x, []
        dropped = self._what_dropped(seen)
        return of_x, kernels.adapt_backward(gradient, x, narrow, self.adapters, dropped, of_x)

    def _what_dropped(self, seen: Any) -> Dropped:
        return Dropped(seen, 1.0 if seen is None else DRAWS / (DRAWS - self._dropped))


def _starts(layers: Sequence[Any], bases: Sequence[Any]) -> list[tuple[Any, int]]:
    found, start = [], 0
    for layer, base in zip(layers, bases, strict=True):
        found.append((layer, start))
        start += base.weight.shape[0]
    return found


def _collect(layer: Any, adapters: list[Adapter], start: int) -> float | None:
    """Add the layer's adapter; returns its dropout rate, None without an adapter. Raises: NotFusableError."""
    if not hasattr(layer, "base_layer"):
        return None
    active = list(layer.active_adapters)
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] not in layer.lora_A:
        raise NotFusableError("not exactly one adapter is active")
    name = active[0]
    plain = not getattr(layer, "lora_variant", {}).get(name) and not layer.lora_bias.get(name)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not plain or not (a.requires_grad and b.requires_grad):
        raise NotFusableError("an adapter that is more than two matrices")
    first_rank = adapters[-1].ranks.stop if adapters else 0
    adapters.append(
        Adapter(
            a,
            b,
            float(layer.scaling[name]),
            slice(start, start + b.shape[0]),
            slice(first_rank, first_rank + a.shape[0]),
        )
    )
    return float(getattr(layer.lora_dropout[name], "p", 0.0))


def joined(weights: Sequence[Any]) -> Any:
    """One matrix of all rows, of which each parameter is a view: nothing is held twice."""
    if not _lie_in_line(weights):
        put_in_line(weights, weights[0].dtype)
    first, rows = weights[0].detach(), sum(map(len, weights))
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def put_in_line(weights: Sequence[Any], dtype: Any) -> None:
    """Copy matrices of one width to where each begins as the one before it ends."""
    joint, start = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype), 0
    for weight in weights:
        weight.data = joint[start : start + len(weight)].copy_(weight.detach())
        start += len(weight)


def _lie_in_line(weights: Sequence[Any]) -> bool:
    if not all(weight.is_contiguous() for weight in weights):
        return False
    is_one = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    return is_one and all(weight.data_ptr() == end for weight, end in zip(weights[1:], ends, strict=False))


def _joined_bias(bases: Sequence[Any]) -> Any:
    import torch

    biases = [base.bias for base in bases]
    if all(bias is None for bias in biases):
        return None
    if any(bias is None or bias.requires_grad for bias in biases):
        raise NotFusableError("biases that are trained, or of only some layers")
    return torch.cat([bias.detach() for bias in biases])
