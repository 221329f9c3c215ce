"""When a run has gone wrong: a loss that is no number, or one that stays far too high. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Literal

Reason = Literal["nan", "spike"]
Verdict = Literal["good", "suspect", "nan", "spike"]

WINDOW = 32  # good losses that a new one is judged by
ENOUGH = 8  # before that many are known, only NaN is judged
LEVEL_OF = 5  # losses
PROVEN_AFTER = 5  # steps after a checkpoint that have to be calm before it is worth going back to
SUSTAINED = 5  # suspect steps in a row that make a spike: one hard batch is none
RATE_CUT = 0.3  # what a rollback leaves of the learning rate: two of them reach a tenth


@dataclass
class LossWatch:
    """Sees the loss of every step. Part of a checkpoint, so that a resumed run judges as it would have."""

    recent: list[float] = field(default_factory=list)
    """The last good losses, oldest first."""
    suspects: int = 0
    """Steps in a row that were too high."""
    lowest: float | None = None
    """The lowest level so far."""

    def see(self, loss: float) -> Verdict:
        """Judge one step's loss, mean over its label tokens."""
        if not isfinite(loss):
            return "nan"
        if loss > self.limit:
            self.suspects += 1
            return "spike" if self.suspects >= SUSTAINED else "suspect"
        self.suspects = 0
        self.recent = [*self.recent, loss][-WINDOW:]
        self.lowest = self.level if self.lowest is None else min(self.lowest, self.level)
        return "good"

    @property
    def level(self) -> float:
        """Where the loss stands, single batches aside."""
        return median(self.recent[-LEVEL_OF:])

    @property
    def is_calm(self) -> bool:
        """Whether this is a place to come back to.

        A run that diverges climbs for a while before it is caught: going back into that would change little.
        """
        return self.suspects == 0 and self.lowest is not None and self.level <= 1.25 * self.lowest + 0.1

    @property
    def limit(self) -> float:
        """The highest loss that is still good: nothing near what was seen of late, nor double the usual."""
        if len(self.recent) < ENOUGH:
            return float("inf")
        usual = median(self.recent)
        return max(2 * usual, usual + 0.5, *self.recent)


@dataclass(frozen=True, slots=True)
class Rollback:
    """One return to a good checkpoint: an entry of the run's report."""

    reason: Reason
    step: int
    """The step that went wrong."""
    to_step: int
    loss: float | None
    """None where it was no number."""
    rate_scale: float
    """The learning rate from here on, as a share of what the configuration says."""

    def text(self, learning_rate: float) -> str:
        """For people."""
        rate = learning_rate * self.rate_scale
        loss = "no number" if self.loss is None else f"{self.loss:.4g}, far above what it was,"
        where = f"the checkpoint of step {self.to_step}" if self.to_step else "the start"
        return (
            f"The loss was {loss} in step {self.step}. Going back to {where} with the learning rate "
            f"cut from {rate / RATE_CUT:.3g} to {rate:.3g}"
        )


@dataclass(frozen=True, slots=True)
class Fault:
    """A step that went wrong."""

    reason: Reason
    step: int
    loss: float

    def rollback(self, to_step: int, rate_scale: float) -> Rollback:
        """What is done about it: the learning rate is lower for the rest of the run."""
        loss = self.loss if self.reason == "spike" and isfinite(self.loss) else None
        return Rollback(self.reason, self.step, to_step, loss, rate_scale * RATE_CUT)

    def advice(self, learning_rate: float, rollbacks: int) -> str:
        """Why the run ends here, and what to do."""
        what = (
            f"stayed at {self.loss:.4g}, far above what it was,"
            if self.reason == "spike"
            else "became no number"
        )
        often = {1: "once", 2: "twice"}.get(rollbacks, f"{rollbacks} times")
        tried = f", also after going back {often} and on at a lower rate" if rollbacks else ""
        return (
            f"The loss {what} in step {self.step}{tried}. Lower learning_rate (it was {learning_rate:g}), "
            "use precision 'bf16' or 'fp32', or look for rows that are not like the others "
            "(`sage finetune validate`)."
        )
