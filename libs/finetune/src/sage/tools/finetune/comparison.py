"""The base before the steps and the result after them, measured on the same held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.evaluation import HeldOut, Scores
from sage.tools.finetune.modeling import load_weights
from sage.tools.finetune.rollback import require_number
from sage_contracts.config import TrainingConfig


@dataclass(frozen=True)
class Comparison:
    """Of one run. What is measured of the base is kept in the run's state."""

    config: TrainingConfig
    held: HeldOut

    def measure_base_at_once(self, state: RunState) -> bool:
        """Whether the base is still to be measured: after a step it is the model without its adapters.

        Raises: RunStopped.
        """
        if state.step and (state.base_eval_loss is not None or not self.held):
            return False
        # Biases that train are part of the base, and shards are not switched off and on again.
        is_adapter = self.config.tuning == "lora" and self.config.lora.bias == "none"
        can_wait = is_adapter and self.held.team.size == 1
        if not can_wait and state.step == 0:
            self._measure_base(state)
        return can_wait

    def measure_bare(self, state: RunState) -> None:
        """Measure the base once steps were taken. Raises: RunStopped."""
        with self.held.model.disable_adapter():
            self._measure_base(state)
        self.held.callbacks.on_phase("training", "on to the other steps")

    def _measure_base(self, state: RunState) -> None:
        held = self.held
        if held:
            held.callbacks.on_phase("base_eval", f"Held-out loss of the base on {len(held.samples)} rows")
        elif self.config.eval_steps:
            held.callbacks.on_log("warn", "eval_steps is set, but no rows are held out: nothing is measured")
        scores = held.measure()
        if scores:
            state.base_eval_loss, state.base_token_accuracy = scores.loss, scores.token_accuracy
        held.tell("base", 0, scores)

    def settle(self, checkpoints: Checkpoints, state: RunState) -> Scores | None:
        """Make the model the run's result: the best evaluation's where that is kept, else the last step's.

        Raises: RunStopped, TrainingFailedError.
        """
        held, last, best = self.held, state.evaluation, state.best
        is_measured = last is not None and last["step"] == state.step
        scores = Scores(last["loss"], last["token_accuracy"]) if last and is_measured else held.measure()
        # A last loss that is no number is behind, too.
        is_behind = best is not None and scores is not None and not scores.loss <= best["loss"]
        if is_behind and self.config.keep_best and not held.team.can_restore:
            held.callbacks.on_log("warn", "A model in shards keeps the weights of its last step")
        elif best and is_behind and self.config.keep_best:
            step = int(best["step"])
            if checkpoints.is_whole(step):
                load_weights(held.model, checkpoints.of_step(step))
                scores = Scores(best["loss"], best["token_accuracy"])
                told = f"The result is step {step}, whose held-out loss was the lowest"
                held.callbacks.on_log("info", told)
                state.kept_step = step
            else:
                told = f"The best checkpoint, of step {step}, is damaged; using the last"
                held.callbacks.on_log("warn", told)
        if scores is not None:
            require_number(scores.loss, state, self.config.learning_rate)
        has_answered = state.answered_step == state.step or state.kept_step is not None
        held.tell("tuned", state.kept_step or state.step, scores, has_answered=has_answered)
        return scores
