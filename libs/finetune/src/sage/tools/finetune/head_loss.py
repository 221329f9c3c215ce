"""Cross-entropy through a large output layer without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sage.tools.finetune.step_kernels import first_choices, kernels_for

IGNORED = -100  # torch's own mark for positions without a label

# Positions per pass through the output layer: bounds the logits to this many rows of the vocabulary.
HEAD_CHUNK = 256


def head_loss(hidden: Any, head: Any, labels: Any, chunk: int = HEAD_CHUNK) -> tuple[Any, Any]:
    """Of head(hidden) at labels: (summed cross-entropy, how many labels are the first choice), scalars.

    hidden (n, width), labels (n,). A frozen plain output layer gets its gradient in the forward pass, so that
    logits of a chunk are dropped as soon as they are used: memory stays at `chunk` x vocabulary.
    """
    from torch.nn import Linear
    from torch.nn.functional import cross_entropy

    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    if frozen and type(head) is Linear:
        return _frozen_head_loss()(hidden, head.weight, head.bias, labels, chunk)  # type: ignore[no-any-return]
    total = hits = 0
    for part, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        logits = head(part).float()
        total = total + cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        hits = hits + hits_of(logits, wanted)
    return total, hits


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
