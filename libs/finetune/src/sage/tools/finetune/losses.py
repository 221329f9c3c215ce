"""Summed next-token loss over label positions: the plain way and the fast way, which must agree.

Both take rows of token ids and labels and return the summed negative log-likelihood (not the mean: a mean per
micro-batch would weigh short ones more) as a scalar that carries gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from itertools import groupby
from typing import Any, Protocol

from sage.tools.finetune.attention import PACKED_ATTENTION, no_mask, register_packed_attention
from sage.tools.finetune.batching import micro_batches
from sage.tools.finetune.fused_layer import fuse_layers, unfuse_layers
from sage.tools.finetune.hardware import give_back_memory
from sage.tools.finetune.head_loss import HEAD_CHUNK, IGNORED, head_loss, hits_of
from sage.tools.finetune.kernels import VarlenAttention
from sage.tools.finetune.modeling import causal_of
from sage.tools.finetune.prefix_tree import PackedRows, beginnings, distinct_tokens, pack
from sage.tools.finetune.projections import NotFusableError
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.widening import by_torch, computing_dtype

HALF_GRANULE = 64  # tokens; sizes are rounded up to this where every new size costs memory


class LossFunction(Protocol):
    name: str

    def with_hits(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        """(the sum, how many label tokens are the model's first choice), both scalars on the device."""

    def __call__(self, rows: Sequence[Sample]) -> Any:
        """The sum."""
        return self.with_hits(rows)[0]

    def groups(
        self, rows: Sequence[Sample], token_budget: int, max_rows: int | None = None
    ) -> list[list[int]]:
        """Indices of the rows by the forward pass that they go through."""
        return micro_batches([len(row.ids) for row in rows], token_budget, max_rows)

    def computed_tokens(self, rows: Sequence[Sample]) -> int:
        """What a pass over them computes, and is the larger for."""
        return sum(len(row.ids) for row in rows)

    def computed_by(self, rows: Sequence[Sample], group: Sequence[int]) -> int:
        """What a pass over those of the rows computes."""
        return self.computed_tokens([rows[index] for index in group])

    def scores(self, rows: Sequence[Sample]) -> tuple[float, int]:
        """The sum and the hits as numbers. Call under no_grad."""
        total, hits = self.with_hits(rows)
        return float(total), int(hits)


class PlainLoss(LossFunction):
    """Row by row through the model as transformers runs it: slow, and right for every architecture."""

    name = "plain"

    def __init__(self, model: Any, *, is_batched: bool = False) -> None:
        """`is_batched`: neighbours of one length go together, which is quicker and holds all their logits."""
        self._model = model
        self._is_batched = is_batched
        self._can_choose = "logits_to_keep" in signature(causal_of(model).forward).parameters

    def with_hits(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        from torch.nn.functional import cross_entropy

        total = hits = 0
        for batch in self._batches(rows):
            logits, labels = self._logits(batch)
            total = total + cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            hits = hits + hits_of(logits, labels)
        return total, hits

    def _batches(self, rows: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Rows of one length each, so that there is no padding."""
        if not self._is_batched:
            return ([row] for row in rows)
        return (list(batch) for _, batch in groupby(rows, key=lambda row: len(row.ids)))

    def _logits(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        """(logits (predicted tokens, vocabulary) of rows of one length, the labels they are to predict).

        Of positions where one of the rows has a label.
        """
        import torch

        ids = torch.tensor([row.ids for row in rows], device=self._model.device)
        labels = torch.tensor([row.labels[1:] for row in rows], device=self._model.device)
        wanted = (labels != IGNORED).any(0).nonzero()[:, 0]
        only = {"logits_to_keep": wanted} if self._can_choose else {}
        with by_torch():
            logits = self._model(input_ids=ids, use_cache=False, **only).logits
        logits = logits if self._can_choose else logits[:, wanted]
        return logits.float().flatten(0, 1), labels[:, wanted].flatten()


class PackedLoss(LossFunction):
    """All rows in one sequence without padding; logits only where there is a label, a chunk at a time.

    Make it under the autocast that it is to run under.
    """

    name = "packed"

    def __init__(
        self, model: Any, head_chunk: int = HEAD_CHUNK, varlen: VarlenAttention | None = None
    ) -> None:
        from torch import is_autocast_enabled

        register_packed_attention()
        self._head_chunk = head_chunk
        self._kernel = {"varlen": varlen} if varlen else {}
        causal = causal_of(model)
        self._causal, self._usual_attention = causal, causal.config._attn_implementation
        self._decoder = causal.get_decoder()
        self._head = causal.get_output_embeddings()
        causal.set_attn_implementation(PACKED_ATTENTION)
        # oneDNN keeps kernels for every size of matrix it meets in half precision: memory would grow with
        # every new number of tokens. In fp32, and on GPUs, sizes cost nothing.
        is_cpu = causal.device.type == "cpu"
        is_half = is_cpu and (computing_dtype(causal).itemsize < 4 or is_autocast_enabled("cpu"))
        self._granule = HALF_GRANULE if is_half else 1
        if is_cpu and not is_half:
            self._head_chunk = self._head_chunk * 3 // 4  # more at once are no faster there

    def with_hits(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        hidden, wanted = self.at_labels(rows)
        return head_loss(hidden, self._head, wanted, self._head_chunk)

    def computed_tokens(self, rows: Sequence[Sample]) -> int:
        return distinct_tokens([row.inputs for row in rows])

    def at_labels(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        """(hidden states (labels, width) of positions with a label, those labels)."""
        import torch

        device = self._head.weight.device
        packed = pack([row.inputs for row in rows], self._granule)
        labelled, wanted = _labelled(rows, packed)
        if spare := -len(labelled) % self._granule:
            labelled, wanted = [*labelled, *[0] * spare], [*wanted, *[IGNORED] * spare]
        only, labelled = self._kept(labelled, len(packed.ids), device)
        hidden = self._decoder(
            input_ids=torch.tensor([packed.ids], device=device),
            position_ids=torch.tensor([packed.positions], device=device),
            attention_mask=no_mask(device),
            use_cache=False,
            **self._rows_apart(packed, device),
            **self._kernel,
            **only,
        ).last_hidden_state[0]
        # By way of fp32: where rows share labels, that many gradients add up.
        at_labels = hidden.float().index_select(0, torch.tensor(labelled, device=device)).to(hidden.dtype)
        return at_labels, torch.tensor(wanted, device=device)

    def _kept(self, labelled: list[int], tokens: int, device: Any) -> tuple[dict[str, Any], list[int]]:
        """(which tokens' hidden states the decoder need give, where those with a label are among them)."""
        return {}, labelled

    def _rows_apart(self, packed: PackedRows, device: Any) -> dict[str, Any]:
        """What attention needs in order to keep the rows apart."""
        from torch import tensor

        if not packed.is_shared:
            return {"row_lengths": [segment.stop - segment.start for segment in packed.segments]}
        rows = packed.unfolded
        unfolded = [place for row in rows for place in row]
        at = {place: index for index, place in enumerate(unfolded)}
        return {
            "row_lengths": [len(row) for row in rows],
            "unfolded": tensor(unfolded, device=device),
            "folded": tensor([at[place] for place in range(len(packed.ids))], device=device),
        }


def _labelled(rows: Sequence[Sample], packed: PackedRows) -> tuple[list[int], list[int]]:
    """(where hidden states lie that are to predict a label, those labels): each predicts its next token."""
    pairs = [
        (place, label)
        for row, places in zip(rows, packed.places, strict=True)
        for place, label in zip(places, row.labels[1:], strict=False)
        if label != IGNORED
    ]
    return [place for place, _ in pairs], [label for _, label in pairs]


class FusedLoss(PackedLoss):
    """The packed way through layers whose forward and backward are written out. Raises: NotFusableError."""

    name = "fused"

    def __init__(self, model: Any, head_chunk: int = HEAD_CHUNK) -> None:
        super().__init__(model, head_chunk)
        try:
            fuse_layers(self._decoder)
        except NotFusableError:
            self._causal.set_attn_implementation(self._usual_attention)
            raise
        give_back_memory()

    def groups(
        self, rows: Sequence[Sample], token_budget: int, max_rows: int | None = None
    ) -> list[list[int]]:
        """Rows that begin alike go together, and only what is computed counts."""
        inputs = [row.inputs for row in rows]
        return micro_batches([len(row) for row in inputs], token_budget, max_rows, beginnings(inputs))

    def _rows_apart(self, packed: PackedRows, device: Any) -> dict[str, Any]:
        # A layer that goes its own way, as adapters are switched off, needs what the packed way does.
        return {**super()._rows_apart(packed, device), "segments": packed.segments}

    def _kept(self, labelled: list[int], tokens: int, device: Any) -> tuple[dict[str, Any], list[int]]:
        from torch import tensor

        kept = sorted(set(labelled))
        kept += kept[:1] * (-len(kept) % self._granule)
        if len(kept) >= tokens:
            return {}, labelled
        at = {place: index for index, place in enumerate(kept)}
        return {"kept": tensor(kept, device=device)}, [at[place] for place in labelled]

    def undo(self) -> None:
        """Give the model its own layers and attention back."""
        unfuse_layers(self._decoder)
        self._causal.set_attn_implementation(self._usual_attention)


class AutocastLoss(LossFunction):
    """Another loss, computed in half precision from weights that are not."""

    def __init__(self, loss: LossFunction, device: str, dtype: Any) -> None:
        self.name = loss.name
        self._loss = loss
        self._half = (device, dtype)

    def groups(
        self, rows: Sequence[Sample], token_budget: int, max_rows: int | None = None
    ) -> list[list[int]]:
        return self._loss.groups(rows, token_budget, max_rows)

    def computed_tokens(self, rows: Sequence[Sample]) -> int:
        return self._loss.computed_tokens(rows)

    def with_hits(self, rows: Sequence[Sample]) -> tuple[Any, Any]:
        from torch import autocast

        with autocast(*self._half):
            return self._loss.with_hits(rows)
