"""Cross-entropy through a large output layer without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sage.tools.finetune.step_kernels import first_choices, kernels_for
from sage.tools.finetune.widening import is_plain_linear

IGNORED = -100  # torch's own mark for positions without a label

# Positions per pass through the output layer: bounds the logits to this many rows of the vocabulary.
HEAD_CHUNK = 256


def head_loss(hidden: Any, head: Any, labels: Any, chunk: int = HEAD_CHUNK) -> tuple[Any, Any]:
    """Of head(hidden) at labels: (summed cross-entropy, how many labels are the first choice), scalars.

    hidden (n, width), labels (n,). Gradients are computed in the forward pass, so that logits of a chunk are
    dropped as soon as they are used: memory stays at `chunk` x vocabulary.
    """
    from torch import is_grad_enabled

    trained = {name: weight for name, weight in head.named_parameters() if weight.requires_grad}
    if not trained and is_plain_linear(head):
        return _frozen_head_loss()(hidden, head.weight, head.bias, labels, chunk)  # type: ignore[no-any-return]
    if is_grad_enabled():
        return _any_head_loss()(hidden, head, labels, chunk, list(trained), *trained.values())  # type: ignore[no-any-return]
    total = hits = 0
    for part, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        loss, found = _loss_of(head(part), wanted)
        total, hits = total + loss, hits + found
    return total, hits


def _loss_of(logits: Any, labels: Any) -> tuple[Any, Any]:
    from torch.nn.functional import cross_entropy

    logits = logits.float()
    return cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), hits_of(logits, labels)


def hits_of(logits: Any, labels: Any) -> Any:
    """How many labels (n,) are the first choice of logits (n, vocabulary), on their device."""
    return first_choices(logits.detach(), labels).sum()


@cache
def _frozen_head_loss() -> Callable[..., Any]:
    """The autograd function; made on first use, so that importing this module costs no torch."""
    import torch

    class FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, chunk: int) -> Any:
            kernels = kernels_for(hidden.device, hidden.dtype, *weight.shape)
            total = hidden.new_zeros((), dtype=torch.float32)
            hits = hidden.new_zeros((), dtype=torch.int64)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            # One buffer for all chunks: logits of ever new sizes would leave holes in the heap.
            room = torch.empty(chunk, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                wanted = labels[part]
                logits = kernels.product(hidden[part], weight, out=room[: len(wanted)])
                if bias is not None:
                    logits += bias
                losses, found = kernels.cross_entropy(logits, wanted, gradient is not None)
                total += losses.sum()
                hits += found.sum()
                if gradient is not None:
                    kernels.product(logits, weight.t(), out=gradient[part])
            if gradient is not None:
                ctx.save_for_backward(gradient)
            ctx.mark_non_differentiable(hits)
            return total, hits

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0].to(gradient.dtype), None, None, None, None

    return FrozenHeadLoss.apply  # type: ignore[no-any-return]


@cache
def _any_head_loss() -> Callable[..., Any]:
    """For an output layer of any kind, some of whose parameters train, or none."""
    import torch
    from torch.func import functional_call

    class AnyHeadLoss(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
        @staticmethod
        def forward(
            ctx: Any, hidden: Any, head: Any, labels: Any, chunk: int, names: list[str], *weights: Any
        ) -> Any:
            total = hidden.new_zeros((), dtype=torch.float32)
            hits = hidden.new_zeros((), dtype=torch.int64)
            needs_hidden = ctx.needs_input_grad[0]
            of_hidden = torch.empty_like(hidden) if needs_hidden else None
            of_weights = [torch.zeros_like(weight) for weight in weights]
            leaves = [weight.detach().requires_grad_() for weight in weights]
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                with torch.enable_grad():
                    seen = hidden[part].detach().requires_grad_(needs_hidden)
                    logits = functional_call(head, dict(zip(names, leaves, strict=True)), (seen,))
                    loss, found = _loss_of(logits, labels[part])
                    del logits
                wanted = [*leaves, seen] if needs_hidden else leaves
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
                for whole, gradient in zip(of_weights, gradients, strict=False):
                    whole += gradient
                if of_hidden is not None:
                    of_hidden[part] = gradients[-1]
                total += loss.detach()
                hits += found
            ctx.save_for_backward(of_hidden, *of_weights)
            ctx.mark_non_differentiable(hits)
            return total, hits

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            scaled = [
                None if gradient is None else gradient.mul_(upstream[0].to(gradient.dtype))
                for gradient in ctx.saved_tensors
            ]
            return scaled[0], None, None, None, None, *scaled[1:]

    return AnyHeadLoss.apply  # type: ignore[no-any-return]
