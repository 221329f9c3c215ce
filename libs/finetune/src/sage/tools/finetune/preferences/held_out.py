"""The held-out preferences, measured with and without the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.evaluation import RunStopped
from sage.tools.finetune.losses import PlainLoss
from sage.tools.finetune.preferences.samples import PairSample, RatedSample, answer_sample, mismatched_answers
from sage.tools.finetune.preferences.scoring import Answer, Scores, dpo_scores, kto_scores, orpo_scores
from sage.tools.finetune.rendering import Sample

Thoughts = dict[str, list[Answer]]
"""What one model thinks of every held-out answer, by its part in a row."""


class HeldOut:
    """Scores of the base (adapters off) and of the tuned model. The base is asked once, and is the reference.

    Its rows are PairSamples for DPO and ORPO, RatedSamples for KTO.
    """

    def __init__(
        self, model: Any, rows: Sequence[PairSample] | Sequence[RatedSample], method: str, beta: float
    ) -> None:
        self._model = model
        self._method = method
        self._beta = beta
        self._plain = PlainLoss(model)
        self._is_desirable = [row.is_desirable for row in rows if isinstance(row, RatedSample)]
        self._parts = _parts(rows)
        self._of_base: Thoughts | None = None

    @property
    def unit(self) -> str:
        """What its rows are, for people."""
        return "answers" if self._is_desirable else "pairs"

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def base(self, callbacks: TrainingCallback) -> Scores:
        """Raises: RunStopped."""
        of_base = self._reference(callbacks)
        return self._scores(of_base, of_base)

    def tuned(self, callbacks: TrainingCallback) -> Scores:
        """Raises: RunStopped."""
        reference = {} if self._method == "orpo" else self._reference(callbacks)
        return self._scores(self._ask(callbacks, nullcontext), reference)

    def _reference(self, callbacks: TrainingCallback) -> Thoughts:
        if self._of_base is None:
            self._of_base = self._ask(callbacks, self._model.disable_adapter)
        return self._of_base

    def _ask(self, callbacks: TrainingCallback, adapters: Callable[[], Any]) -> Thoughts:
        import torch

        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), adapters():
                return {
                    part: [self._answer(part, sample, callbacks) for sample in samples]
                    for part, samples in self._parts.items()
                }
        finally:
            self._model.train(was_training)

    def _answer(self, part: str, sample: Sample, callbacks: TrainingCallback) -> Answer:
        if wish := callbacks.should_stop():  # nothing is lost: what was trained is in a checkpoint already
            raise RunStopped(wish)
        logp = -self._plain([sample]).item()
        if self._method != "orpo" or part != "chosen":
            return Answer(logp, sample.label_count)
        whole = -self._plain([Sample(sample.ids, sample.ids)]).item()
        return Answer(logp, sample.label_count, whole, len(sample.ids) - 1)

    def _scores(self, policy: Thoughts, reference: Thoughts) -> Scores:
        if self._method == "kto":
            drifts = [p.logp - r.logp for p, r in zip(policy["swapped"], reference["swapped"], strict=True)]
            drift = sum(drifts) / len(drifts)
            return kto_scores(policy["answer"], reference["answer"], self._is_desirable, drift, self._beta)
        pairs = list(zip(policy["chosen"], policy["rejected"], strict=True))
        if self._method == "orpo":
            return orpo_scores(pairs, self._beta)
        return dpo_scores(
            pairs, list(zip(reference["chosen"], reference["rejected"], strict=True)), self._beta
        )


def _parts(rows: Sequence[PairSample] | Sequence[RatedSample]) -> dict[str, list[Sample]]:
    rated = [row for row in rows if isinstance(row, RatedSample)]
    if rated:
        swapped = mismatched_answers(rated)
        return {
            "answer": [answer_sample(row.prompt, row.answer) for row in rated],
            "swapped": [
                answer_sample(row.prompt, answer) for row, answer in zip(rated, swapped, strict=True)
            ],
        }
    pairs = [row for row in rows if isinstance(row, PairSample)]
    return {
        "chosen": [answer_sample(row.prompt, row.chosen) for row in pairs],
        "rejected": [answer_sample(row.prompt, row.rejected) for row in pairs],
    }
