"""Which loss a run computes with: the fastest that proves equal to the plain one on rows of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sage.tools.finetune.fused_layer import require_fusable
from sage.tools.finetune.hardware import memory_reason
from sage.tools.finetune.head_loss import IGNORED
from sage.tools.finetune.kernels import VarlenAttention
from sage.tools.finetune.losses import FusedLoss, LossFunction, PackedLoss, PlainLoss
from sage.tools.finetune.modeling import causal_of, is_quantised
from sage.tools.finetune.packable import require_own_angles, require_plain_head, require_rows_apart
from sage.tools.finetune.prefix_tree import SHORTEST_SHARED
from sage.tools.finetune.projections import NotFusableError
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.step_kernels import why_slower
from sage.tools.finetune.widening import computing_dtype

PROBE_TOKENS = 32  # of each row that the paths are compared on
PROBE_LAYERS = (
    2  # that the fused path is compared on: the first that trains, and one that passes gradients on
)
WRONG_GRADIENTS = 0.5  # off by this share: no rounding makes a kernel's gradients differ so much


class Tolerance(NamedTuple):
    """Relative; separates rounding from a model that does something which a path leaves out."""

    loss: float
    gradient: float
    neighbour: float
    """What one row may change of another: nothing, but where rows choose each other's kernels (experts)."""


EXACT = Tolerance(1e-3, 5e-3, 1e-3)
# Half precision rounds each path differently, either as near to fp32.
HALF = Tolerance(0.02, 0.12, 0.01)
# Two short rows, a dozen labels, were 4 % apart. The fused path has its gradients compared as well.
HALF_FUSED_LOSS = 0.05
# These layers quantise activations by what else is in the batch.
QUANTISED = Tolerance(0.05, 0.25, 0.03)
_BROKEN = (AttributeError, TypeError, ValueError, ImportError, RuntimeError)
"""What a strange model or a broken kernel may raise."""


def choose_loss(
    model: Any,
    rows: Sequence[Sample],
    report: Callable[[str], None],
    kernels: Mapping[str, VarlenAttention] | None = None,
) -> LossFunction:
    """The fastest loss that proves equal to the plain one on the ends of two rows; else the plain one.

    `kernels` are tried in their order for the packed one where adapters train; without them, each row is
    attended to by itself.
    """
    was_training = model.training
    model.eval()  # no dropout, which would differ
    causal = causal_of(model)
    usual_attention = causal.config._attn_implementation
    try:
        require_own_angles(causal.config, rows)
        return _proven_loss(model, causal, _probes(rows[:2]), report, kernels or {})
    except _BROKEN as error:
        reason = _reason(error)
    finally:
        model.train(was_training)
    causal.set_attn_implementation(usual_attention)
    report(f"The packed path does not fit this model ({reason}); training row by row, which is slower.")
    return PlainLoss(model)


def _reason(error: Exception) -> str:
    """Its first line. Raises: the error itself when memory ran out: a smaller step is the way out of that."""
    if memory_reason(error):
        raise error
    return str(error).partition("\n")[0] or type(error).__name__


def _proven_loss(
    model: Any,
    causal: Any,
    probes: Sequence[Sample],
    report: Callable[[str], None],
    kernels: Mapping[str, VarlenAttention],
) -> LossFunction:
    """Raises: ValueError when not even the packed loss is equal; whatever a strange model makes it raise."""
    import torch

    is_exact = computing_dtype(causal) == torch.float32 and not torch.is_autocast_enabled(causal.device.type)
    tolerance = EXACT if is_exact else QUANTISED if is_quantised(causal) else HALF
    unfit = ""
    try:
        fused_tolerance = tolerance if is_exact else tolerance._replace(loss=HALF_FUSED_LOSS)
        fused, unfit = _proven_fused(model, causal, probes, fused_tolerance)
        if fused:
            if slower := why_slower():
                report(slower)
            return fused
    except NotFusableError:
        pass  # the usual case for other families and on GPUs
    require_plain_head(causal, probes[0])
    plain = _Measured.of(PlainLoss(model, is_batched=True), model, probes)
    # Of a whole model no gradients are compared (see `_Measured`), so that no kernel would be proven.
    provable = kernels if plain.gradient is not None else {}
    packed = _proven_packed(model, probes, plain, tolerance, report, provable)
    if unfit:
        report(f"The fused path does not fit this model ({unfit}); training the packed way, which is slower.")
    return packed


def _proven_fused(
    model: Any, causal: Any, probes: Sequence[Sample], tolerance: Tolerance
) -> tuple[FusedLoss | None, str]:
    """(the loss, or None with the model as it was and in what they differ). Raises: NotFusableError."""
    decoder = causal.get_decoder()
    require_fusable(decoder)
    with _few_layers(decoder):
        plain = _Measured.of(PlainLoss(model, is_batched=True), model, probes)
        fused = FusedLoss(model)
        unfit = _Measured.of(fused, model, probes).difference(plain, tolerance)
    if not unfit:
        return fused, ""
    fused.undo()
    return None, unfit


@contextmanager
def _few_layers(decoder: Any) -> Iterator[None]:
    """Leave out those behind the first few that train: all of a fusable decoder are the same code."""
    whole = decoder.config.num_hidden_layers
    trains = [any(weight.requires_grad for weight in layer.parameters()) for layer in decoder.layers]
    first = trains.index(True) if True in trains else 0
    decoder.config.num_hidden_layers = min(whole, first + PROBE_LAYERS)
    try:
        yield
    finally:
        decoder.config.num_hidden_layers = whole


def _proven_packed(
    model: Any,
    probes: Sequence[Sample],
    plain: _Measured,
    tolerance: Tolerance,
    report: Callable[[str], None],
    kernels: Mapping[str, VarlenAttention],
) -> PackedLoss:
    """With the first of the kernels that works; without one where none does. Raises: as `_proven_loss`."""
    import torch

    require_rows_apart(PackedLoss(model), probes, tolerance.neighbour)
    failures: list[str] = []
    for name, varlen in kernels.items():
        packed = PackedLoss(model, varlen=varlen)
        try:
            # Backwards too: on some chips there are head sizes that a kernel only has the forward pass for.
            found = _Measured.of(packed, model, probes)
            problem = found.difference(plain, tolerance._replace(gradient=WRONG_GRADIENTS))
        except _BROKEN as error:
            problem = _reason(error)
        if not problem:
            _report_kernels(failures, f"{name} is used instead", report)
            return packed
        failures.append(f"{name} ({problem})")
    packed = PackedLoss(model)
    with torch.no_grad():
        value = packed(probes).item()
    if difference := _Measured(value, None).difference(plain, tolerance):
        raise ValueError(difference)
    _report_kernels(failures, "each row is attended to by itself, which is slower", report)
    return packed


def _report_kernels(failures: Sequence[str], instead: str, report: Callable[[str], None]) -> None:
    if failures:
        report(f"Not used for attention, as it does not work here: {', '.join(failures)}; {instead}.")


def _probes(rows: Sequence[Sample]) -> list[Sample]:
    """Of each row a few tokens around where its loss begins: as telling as the whole row, and soon computed.

    All begin with the first row's first tokens, so that what rows share is proven too.
    """
    start = list(rows[0].ids[:SHORTEST_SHARED])
    found = []
    for row in rows:
        first = next(index for index, label in enumerate(row.labels) if index and label != IGNORED)
        part = slice(max(0, first - PROBE_TOKENS // 2), first + PROBE_TOKENS // 2)
        labels = [*[IGNORED] * len(start), *row.labels[part]]
        found.append(Sample([*start, *row.ids[part]], labels))
    return found


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
        # Adapters of layers that are left out have none.
        gradients = torch.autograd.grad(
            value, [parameter for _, parameter in trained], allow_unused=True, materialize_grads=True
        )
        return cls(value.item(), torch.cat([gradient.flatten().float() for gradient in gradients]))

    def difference(self, other: _Measured, tolerance: Tolerance) -> str:
        """In words; empty when both are the same but for rounding."""
        if not abs(self.value - other.value) <= tolerance.loss * abs(other.value):  # NaN is neither
            return f"it gave {self.value:.4f} where the model gives {other.value:.4f}"
        if self.gradient is not None and other.gradient.isfinite().all():
            off = float((self.gradient - other.gradient).norm() / other.gradient.norm().clamp(min=1e-12))
            if not off <= tolerance.gradient:
                return f"its gradients are {off:.1%} off the model's"
        return ""
