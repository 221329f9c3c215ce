"""Summed next-token loss over label positions: the plain way and the fast way, which must agree.

Both take rows of token ids and labels and return the summed negative log-likelihood (not the mean: a mean per
micro-batch would weigh short ones more) as a scalar that carries gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sage.tools.finetune.attention import PACKED_ATTENTION, register_packed_attention
from sage.tools.finetune.rendering import IGNORED, Sample

# Label positions per pass through the output layer: bounds the logits to this many rows of the vocabulary.
HEAD_CHUNK = 256
SAME_LOSS = 1e-3  # relative; separates rounding from a model that does something after its output layer


class LossFunction(Protocol):
    name: str

    def __call__(self, rows: Sequence[Sample]) -> Any: ...


class PlainLoss:
    """Row by row through the model as transformers runs it: slow, and right for every architecture."""

    name = "plain"

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, rows: Sequence[Sample]) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        device = self._model.device
        total = None
        for row in rows:
            ids = torch.tensor([row.ids], device=device)
            labels = torch.tensor(row.labels[1:], device=device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            total = loss if total is None else total + loss
        return total


class PackedLoss:
    """All rows in one sequence without padding; logits only where there is a label, a chunk at a time."""

    name = "packed"

    def __init__(self, model: Any, head_chunk: int = HEAD_CHUNK) -> None:
        register_packed_attention()
        self._head_chunk = head_chunk
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        self._model = causal
        causal.set_attn_implementation(PACKED_ATTENTION)

    def __call__(self, rows: Sequence[Sample]) -> Any:
        import torch

        device = self._head.weight.device
        ids = torch.tensor([token for row in rows for token in row.ids], device=device)
        positions = torch.cat([torch.arange(len(row.ids), device=device) for row in rows])
        # A hidden state predicts the token after it; a row's last one predicts nothing.
        nexts = torch.tensor([label for row in rows for label in (*row.labels[1:], IGNORED)], device=device)
        hidden = self._decoder(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            row_lengths=[len(row.ids) for row in rows],
        ).last_hidden_state[0]
        labelled = (nexts != IGNORED).nonzero().squeeze(1)
        return chunked_head_loss(hidden[labelled], self._head, nexts[labelled], self._head_chunk)


def chunked_head_loss(hidden: Any, head: Any, labels: Any, chunk: int = HEAD_CHUNK) -> Any:
    """Summed cross-entropy of head(hidden) at labels. hidden (n, width), labels (n,) -> scalar.

    A frozen plain output layer gets its gradient in the forward pass, so that logits of a chunk are dropped
    as soon as they are used: memory stays at `chunk` x vocabulary.
    """
    from torch.nn import Linear
    from torch.nn.functional import cross_entropy

    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    if frozen and type(head) is Linear:
        return _frozen_head_loss()(hidden, head.weight, head.bias, labels, chunk)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return sum(cross_entropy(head(part).float(), wanted, reduction="sum") for part, wanted in parts)


def _frozen_head_loss() -> Callable[..., Any]:
    """The autograd function; made on first use so that importing this module costs no torch."""
    import torch

    global _frozen_head
    if _frozen_head is not None:
        return _frozen_head

    class FrozenHeadLoss(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, labels: Any, chunk: int) -> Any:
            wants_gradient = ctx.needs_input_grad[0]
            total = hidden.new_zeros((), dtype=torch.float32)
            gradient = torch.empty_like(hidden) if wants_gradient else None
            # One buffer of one size for all chunks: logits of ever new sizes would leave holes in the heap.
            product = torch.empty(chunk, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
            buffer = (
                product if product.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
            )
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                wanted = labels[part, None]
                size = len(wanted)
                torch.mm(hidden[part], weight.t(), out=product[:size])
                logits = buffer[:size].copy_(product[:size]) if buffer is not product else product[:size]
                if bias is not None:
                    logits += bias
                # In place, each pass over the logits once: shift, pick the label's, exponentiate, sum.
                logits -= logits.amax(1, keepdim=True)
                picked = logits.gather(1, wanted)
                norm = logits.exp_().sum(1, keepdim=True)
                total += (norm.log() - picked).sum()
                if gradient is not None:
                    # d loss / d logits = softmax - one_hot
                    softmax = logits.div_(norm)
                    softmax.scatter_add_(1, wanted, torch.full_like(norm, -1.0))
                    gradient[part] = product[:size].copy_(softmax) @ weight
            if gradient is not None:
                ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (gradient,) = ctx.saved_tensors
            return gradient * upstream[0].to(gradient.dtype), None, None, None, None

    _frozen_head = FrozenHeadLoss.apply
    return _frozen_head


_frozen_head: Callable[..., Any] | None = None


def choose_loss(model: Any, rows: Sequence[Sample], report: Callable[[str], None]) -> LossFunction:
    """The fast loss where it proves equal to the plain one on two short rows, else the plain one."""
    import torch

    was_training = model.training
    model.eval()
    probes = sorted(rows, key=lambda row: len(row.ids))[:2]
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    usual_attention = causal.config._attn_implementation
    plain = PlainLoss(model)
    reason = ""
    try:
        with torch.no_grad():
            expected = plain(probes).item()
            packed = PackedLoss(model)
            found = packed(probes).item()
        # Half precision rounds each path differently; a missing soft cap or mask is far outside of this.
        tolerance = SAME_LOSS if causal.dtype == torch.float32 else 20 * SAME_LOSS
        if abs(found - expected) <= tolerance * abs(expected):
            return packed
        reason = f"it gave {found:.4f} where the model gives {expected:.4f}"
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        reason = str(error)
    finally:
        model.train(was_training)
    causal.set_attn_implementation(usual_attention)
    report(f"The packed path does not fit this model ({reason}); training row by row, which is slower.")
    return plain
