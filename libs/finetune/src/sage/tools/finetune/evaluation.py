"""How good the model is on rows it does not learn: before, between and after the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sage.tools.finetune.callbacks import (
    Evaluation,
    EvaluationName,
    StopMode,
    TrainingCallback,
)
from sage.tools.finetune.distributed.team import ALONE, Team
from sage.tools.finetune.losses import LossFunction
from sage.tools.finetune.rendering import Sample
from sage.tools.finetune.sampling import tell_answers


class RunStopped(Exception):  # noqa: N818 - nothing went wrong
    """Leaves the run at once: somebody asked for it."""

    def __init__(self, mode: StopMode) -> None:
        super().__init__(mode)
        self.mode = mode


@dataclass(frozen=True, slots=True)
class Scores:
    """Over all label tokens of the held-out rows."""

    loss: float
    token_accuracy: float
    """Share of label tokens that the model would have chosen itself."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows and prompts of one run. False without rows."""

    model: Any
    tokenizer: Any
    loss: LossFunction
    samples: Sequence[Sample]
    prompts: Sequence[str]
    token_budget: int
    callbacks: TrainingCallback
    team: Team = ALONE

    def __bool__(self) -> bool:
        return bool(self.samples)

    def measure(self) -> Scores | None:
        """None without rows. Raises: RunStopped, when somebody asks for it meanwhile."""
        import torch

        if not self.samples:
            return None
        was_training = self.model.training
        self.model.eval()
        summed, hits = 0.0, 0
        groups = self.loss.groups(self.samples, self.token_budget)
        work = partial(self.loss.computed_by, self.samples)
        try:
            with torch.no_grad():
                for group in self.team.share(groups, work):
                    wish = self.callbacks.should_stop()
                    if wish:
                        raise RunStopped(wish)
                    if not group:
                        self.team.idle(lambda: self.loss(self.samples[:1]))
                        continue
                    loss, right = self.loss.scores([self.samples[index] for index in group])
                    summed += loss
                    hits += right
        finally:
            self.model.train(was_training)
        labels = sum(sample.label_count for sample in self.samples)
        return Scores(self.team.total(summed) / labels, self.team.total(hits) / labels)

    def tell(
        self,
        name: EvaluationName,
        step: int,
        scores: Scores | None,
        *,
        is_best: bool = False,
        has_answered: bool = False,
    ) -> None:
        """Report the scores, and what the model answers to the prompts now, unless it has already."""
        if scores is not None:
            self.callbacks.on_eval(Evaluation(name, step, scores.loss, scores.token_accuracy, is_best))
        if not has_answered:
            tell_answers(self.model, self.tokenizer, self.prompts, self.callbacks, step)
