"""Cross-entropy through a large output layer without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

IGNORED = -100  # torch's own mark for positions without a label

# Positions per pass through the output layer: bounds the logits to this many rows of the vocabulary.
HEAD_CHUNK = 256

# Of the vocabulary. A CPU finds a largest value many times faster than its place: first its block is found.
CHOICE_BLOCK = 128


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
    from torch import arange

    logits = logits.detach()
    if logits.shape[1] % CHOICE_BLOCK:
        return (logits.argmax(1) == labels).sum()
    blocks = logits.unflatten(1, (-1, CHOICE_BLOCK))
    block = blocks.amax(2).argmax(1)
    place = blocks[arange(len(block), device=block.device), block].argmax(1)
    return (block * CHOICE_BLOCK + place == labels).sum()


@cache
def _frozen_head_loss() -> Callable[..., Any]:
    """The autograd function; made on first use, so that importing this module costs no torch."""
    import torch

    class FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, chunk: int) -> Any:
            total = hidden.new_zeros((), dtype=torch.float32)
            hits = hidden.new_zeros((), dtype=torch.int64)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            # Buffers of one size for all chunks: logits of ever new sizes would leave holes in the heap.
            product = torch.empty(chunk, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
            is_half = product.dtype.itemsize < 4
            precise = torch.empty_like(product, dtype=torch.float32) if is_half else product
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                counted = (labels[part, None] != IGNORED).float()
                wanted = labels[part, None].clamp(min=0)
                narrow = torch.mm(hidden[part], weight.t(), out=product[: len(wanted)])
                logits = precise[: len(wanted)].copy_(narrow) if is_half else narrow
                if bias is not None:
                    logits += bias
                hits += hits_of(logits, labels[part])
                # In place, and few passes over what is far larger than any cache.
                torch.log_softmax(logits, 1, out=logits)
                total -= (logits.gather(1, wanted) * counted).sum()
                if gradient is not None:
                    # d loss / d logits = softmax - one_hot, and nothing where there is no label.
                    logits.exp_().scatter_add_(1, wanted, -torch.ones_like(counted))
                    found = (narrow.copy_(logits) if is_half else logits) @ weight
                    torch.mul(found, counted, out=gradient[part])
            if gradient is not None:
                ctx.save_for_backward(gradient)
            ctx.mark_non_differentiable(hits)
            return total, hits

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0].to(gradient.dtype), None, None, None, None

    return FrozenHeadLoss.apply  # type: ignore[no-any-return]
