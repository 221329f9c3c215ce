"""Summed next-token loss over label positions: the plain way and the fast way, which must agree.

Both take rows of token ids and labels and return the summed negative log-likelihood (not the mean: a mean per
micro-batch would weigh short ones more) as a scalar that carries gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sage.tools.finetune.attention import PACKED_ATTENTION, register_packed_attention
from sage.tools.finetune.fused_layer import fuse_layers, unfuse_layers
from sage.tools.finetune.hardware import give_back_memory, memory_reason
from sage.tools.finetune.head_loss import HEAD_CHUNK, IGNORED, head_loss, head_scores
from sage.tools.finetune.projections import NotFusableError
from sage.tools.finetune.rendering import Sample

HALF_GRANULE = 64  # tokens; sizes are rounded up to this where every new size costs memory
PROBE_TOKENS = 32  # of each row that the paths are compared on
GRADIENT_LOOSENESS = 5  # gradients carry more rounding than the loss
SAME_LOSS = 1e-3  # relative; separates rounding from a model that does something after its output layer


class LossFunction(Protocol):
    name: str

    def __call__(self, rows: Sequence[Sample]) -> Any: ...

    def scores(self, rows: Sequence[Sample]) -> tuple[float, int]:
        """(the same sum as a number, label tokens that are the model's first choice). Call under no_grad."""


class PlainLoss:
    """Row by row through the model as transformers runs it: slow, and right for every architecture."""

    name = "plain"

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, rows: Sequence[Sample]) -> Any:
        from torch.nn.functional import cross_entropy

        losses = (cross_entropy(*self._logits(row), ignore_index=IGNORED, reduction="sum") for row in rows)
        return sum(losses)

    def scores(self, rows: Sequence[Sample]) -> tuple[float, int]:
        from torch.nn.functional import cross_entropy

        total, hits = 0.0, 0
        for row in rows:
            logits, labels = self._logits(row)
            total += float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            hits += int((logits.argmax(1) == labels).sum())
        return total, hits

    def _logits(self, row: Sample) -> tuple[Any, Any]:
        """(logits (tokens - 1, vocabulary), the labels that they are to predict)."""
        import torch

        ids = torch.tensor([row.ids], device=self._model.device)
        labels = torch.tensor(row.labels[1:], device=self._model.device)
        return self._model(input_ids=ids, use_cache=False).logits[0, :-1].float(), labels


class PackedLoss:
    """All rows in one sequence without padding; logits only where there is a label, a chunk at a time."""

    name = "packed"

    def __init__(self, model: Any, head_chunk: int = HEAD_CHUNK) -> None:
        register_packed_attention()
        self._head_chunk = head_chunk
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._decoder = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        causal.set_attn_implementation(PACKED_ATTENTION)
        # oneDNN keeps kernels for every size of matrix it meets in half precision: memory would grow with
        # every new number of tokens. In fp32, and on GPUs, sizes cost nothing.
        half_on_cpu = causal.device.type == "cpu" and causal.dtype.itemsize < 4
        self._granule = HALF_GRANULE if half_on_cpu else 1

    def __call__(self, rows: Sequence[Sample]) -> Any:
        hidden, wanted = self._at_labels(rows)
        return head_loss(hidden, self._head, wanted, self._head_chunk)

    def scores(self, rows: Sequence[Sample]) -> tuple[float, int]:
        hidden, wanted = self._at_labels(rows)
        return head_scores(hidden, self._head, wanted, self._head_chunk)

    def _at_labels(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        """(hidden states (labels, width) of positions with a label, those labels)."""
        import torch

        device = self._head.weight.device
        ids = [token for row in rows for token in row.ids]
        # A hidden state predicts the token after it; a row's last one predicts nothing.
        nexts = [label for row in rows for label in (*row.labels[1:], IGNORED)]
        lengths = [len(row.ids) for row in rows]
        if spare := -len(ids) % self._granule:  # a row of nothing at the end, seen by no other
            ids, nexts, lengths = [*ids, *[0] * spare], [*nexts, *[IGNORED] * spare], [*lengths, spare]
        labelled = [index for index, label in enumerate(nexts) if label != IGNORED]
        wanted = [nexts[index] for index in labelled]
        if spare := -len(labelled) % self._granule:
            labelled, wanted = [*labelled, *[0] * spare], [*wanted, *[IGNORED] * spare]
        hidden = self._decoder(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.cat([torch.arange(length, device=device) for length in lengths])[None],
            use_cache=False,
            row_lengths=lengths,
        ).last_hidden_state[0]
        return hidden[torch.tensor(labelled, device=device)], torch.tensor(wanted, device=device)


class FusedLoss(PackedLoss):
    """The packed way through layers whose forward and backward are written out. Raises: NotFusableError."""

    name = "fused"

    def __init__(self, model: Any, head_chunk: int = HEAD_CHUNK) -> None:
        super().__init__(model, head_chunk)
        fuse_layers(self._decoder)
        give_back_memory()

    def undo(self) -> None:
        """Give the model its own layers back."""
        unfuse_layers(self._decoder)


class AutocastLoss:
    """Another loss, computed in half precision from weights that are not."""

    def __init__(self, loss: LossFunction, device: str, dtype: Any) -> None:
        self.name = loss.name
        self._loss = loss
        self._half = (device, dtype)

    def __call__(self, rows: Sequence[Sample]) -> Any:
        from torch import autocast

        with autocast(*self._half):
            return self._loss(rows)

    def scores(self, rows: Sequence[Sample]) -> tuple[float, int]:
        from torch import autocast

        with autocast(*self._half):
            return self._loss.scores(rows)


def choose_loss(model: Any, rows: Sequence[Sample], report: Callable[[str], None]) -> LossFunction:
    """The fastest loss that proves equal to the plain one on the ends of two rows; else the plain one."""
    was_training = model.training
    model.eval()  # no dropout, which would differ
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    usual_attention = causal.config._attn_implementation
    try:
        return _proven_loss(model, causal, [_probe(row) for row in rows[:2]], report)
    except (AttributeError, TypeError, ValueError, ImportError, RuntimeError) as error:
        if memory_reason(error):  # a smaller step is the way out of that
            raise
        reason = str(error)
    finally:
        model.train(was_training)
    causal.set_attn_implementation(usual_attention)
    report(f"The packed path does not fit this model ({reason}); training row by row, which is slower.")
    return PlainLoss(model)


def _proven_loss(
    model: Any, causal: Any, probes: Sequence[Sample], report: Callable[[str], None]
) -> LossFunction:
    """Raises: ValueError when not even the packed loss is equal; whatever a strange model makes it raise."""
    import torch

    # Half precision rounds each path differently, and 8-bit layers quantise activations by what else is
    # in the batch: 2 % was seen, either path as near to fp32. A missing soft cap or mask is far outside.
    looseness = 50 if getattr(causal, "is_quantized", False) else 20
    tolerance = SAME_LOSS if causal.dtype == torch.float32 else looseness * SAME_LOSS
    plain = _Measured.of(PlainLoss(model), model, probes)
    unfit = ""
    try:
        fused = FusedLoss(model)
        unfit = _Measured.of(fused, model, probes).difference(plain, tolerance)
        if not unfit:
            return fused
        fused.undo()
    except NotFusableError:
        pass  # the usual case for other families and on GPUs
    packed = PackedLoss(model)
    with torch.no_grad():
        value = packed(probes).item()
    if difference := _Measured(value, None).difference(plain, tolerance):
        raise ValueError(difference)
    if unfit:
        report(f"The fused path does not fit this model ({unfit}); training the packed way, which is slower.")
    return packed


def _probe(row: Sample) -> Sample:
    """A few tokens around where the row's loss begins: as telling as the whole row, and soon computed."""
    first = next(index for index, label in enumerate(row.labels) if index and label != IGNORED)
    part = slice(max(0, first - PROBE_TOKENS // 2), first + PROBE_TOKENS // 2)
    return Sample(row.ids[part], row.labels[part])


@dataclass(frozen=True)
class _Measured:
    """What a loss gives on some rows: its value, and the gradients of all adapters as one vector."""

    value: float
    gradient: Any

    @classmethod
    def of(cls, loss: LossFunction, model: Any, rows: Sequence[Sample]) -> _Measured:
        import torch

        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        value = loss(rows)
        if not trained:  # the whole model trains: its gradients are too many to be held twice
            return cls(value.item(), None)
        gradients = torch.autograd.grad(value, [parameter for _, parameter in trained])
        return cls(value.item(), torch.cat([gradient.flatten().float() for gradient in gradients]))

    def difference(self, other: _Measured, tolerance: float) -> str:
        """In words; empty when both are the same but for rounding."""
        if abs(self.value - other.value) > tolerance * abs(other.value):
            return f"it gave {self.value:.4f} where the model gives {other.value:.4f}"
        if self.gradient is not None:
            off = float((self.gradient - other.gradient).norm() / other.gradient.norm().clamp(min=1e-12))
            if off > GRADIENT_LOOSENESS * tolerance:
                return f"its gradients are {off:.1%} off the model's"
        return ""
