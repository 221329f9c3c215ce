"""One training run on preferences, in the order things happen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import Evaluation, StepMetrics, TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.modeling import load_weights
from sage.tools.finetune.preferences.held_out import HeldOut
from sage.tools.finetune.preferences.methods import batch_shape, require_trainable
from sage.tools.finetune.preferences.progress import Progress
from sage.tools.finetune.preferences.samples import pair_samples, rated_samples
from sage.tools.finetune.preferences.scoring import Scores
from sage.tools.finetune.preferences.splits import PreferenceSplits, prepare_preferences
from sage.tools.finetune.preferences.steps import PreferenceState, Rows, Steps
from sage.tools.finetune.rollback import require_number
from sage.tools.finetune.row_supply import parts_needed
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.sampling import tell_answers
from sage.tools.finetune.tracking import curves
from sage.tools.finetune.trainer import Run, TrainResult
from sage_contracts.errors import InvalidDataError


class PreferenceRun(Run):
    """Same phases, files and stops as a supervised run; TRL does the steps."""

    def _prepare(self) -> Any:
        # What cannot work is said before anything is loaded.
        require_trainable(self._config)
        batch_shape(self._config)
        return prepare_preferences(
            self._config, training_path=self._t._training_path, validation_path=self._t._validation_path
        )

    def _train(self, splits: PreferenceSplits[Any], base: Path) -> TrainResult:
        config, tell, layout = self._config, self._tell, self._layout
        tell.on_phase("loading", f"Loading {config.model_name}")
        parts = RunParts(config, base, tell, self._climb.taken)
        train, left = self._train_rows(parts, splits.train)
        held_rows = self._render(parts, splits.validation)
        parts.stop_at_turn_ends()
        splits.let_go()
        self._report_cuts(parts, train)
        schedule = self._schedule(len(train), left)
        checkpoints = Checkpoints(layout.checkpoints, self._fingerprint(splits, base, schedule))
        newest = self._newest(checkpoints)
        state = checkpoints.read_state(newest, PreferenceState) if newest else PreferenceState()
        held = HeldOut(parts.model, held_rows, config.method, config.preference_beta)
        layout.write_config(config)
        tuned = None
        with curves(layout, config, state.step, tell) as told:
            answer = partial(tell_answers, parts.model, parts.tokenizer, config.sample_prompts, told)
            if state.step == 0 and not state.rollbacks:
                self._measure_base(held, state, told)
                answer(0)
            told.on_phase("training", f"{schedule.total_steps} steps of {config.effective_batch_size} rows")
            measure = (lambda: held.tuned(told)) if len(held) else None
            progress = Progress(config, schedule, state, checkpoints, told, parts.device, measure, answer)
            Steps(config, parts, train, schedule, checkpoints, progress, told).run(newest)
            state = progress.state
            if progress.stopped:
                return TrainResult(layout.root, None, progress.stopped, base, state.base_eval_loss)
            told.on_phase("eval", f"{len(held)} held-out {held.unit} and the tuned model")
            if len(held):
                tuned = self._settle(parts, checkpoints, state, held, told)
                require_number(tuned.loss, state, config.learning_rate)
                told.on_eval(Evaluation("tuned", state.kept_step or state.step, tuned.loss))
                told.on_log("info", _comparison(state, tuned))
            if not (state.answered_step == state.step or state.kept_step):  # else it has answered already
                answer(state.step)
        tell.on_phase("saving", str(layout.adapter))
        metrics = self._scores(state, schedule, tuned, progress.last_metrics)
        meta = self._record(parts, base, splits).meta(
            metrics, train_rows=len(train), held_out_rows=len(held), loss_name=f"trl-{config.method}"
        )
        meta |= {"method": config.method, "preference_beta": config.preference_beta}
        meta["rollbacks"] = state.rollbacks
        layout.write_result(parts.model, parts.tokenizer, config, meta)
        loss = tuned.loss if tuned else None
        return TrainResult(layout.root, layout.adapter, None, base, state.base_eval_loss, loss, metrics, meta)

    def _measure_base(self, held: HeldOut, state: PreferenceState, told: TrainingCallback) -> None:
        """Raises: RunStopped."""
        if len(held):
            told.on_phase("base_eval", f"{len(held)} held-out {held.unit} and the base")
            state.take_base(held.base(told))
            told.on_eval(Evaluation("base", 0, state.base_eval_loss or 0.0))
        elif self._config.eval_steps:
            told.on_log("warn", "eval_steps is set, but no rows are held out: nothing is measured")

    def _train_rows(self, parts: RunParts, rows: Sequence[Any]) -> tuple[Rows, int]:
        """(samples, rows that no step gets to)"""
        found: list[Any] = []
        left = len(rows)
        for part in parts_needed(self._config, rows, lambda: len(found)):
            found.extend(self._render(parts, part))
            left -= len(part)
        parts.count_train_rows()
        return found, left

    def _render(self, parts: RunParts, rows: Sequence[Any]) -> Rows:
        if self._config.method == "kto":
            return rated_samples(parts.renderer, rows)
        return pair_samples(parts.renderer, rows)

    def _report_cuts(self, parts: RunParts, train: Rows) -> None:
        parts.report_cuts("an answer")
        if not train:
            limit = self._config.max_length
            raise InvalidDataError(
                f"No row has its answers within max_length={limit} tokens. Raise max_length."
            )
        parts.tell_rows()

    def _newest(self, checkpoints: Checkpoints) -> Path | None:
        newest = None
        if self._resume:
            newest = checkpoints.newest_whole(lambda message: self._tell.on_log("warn", message))
        if newest is None:
            checkpoints.clear()  # of an earlier run: never to be continued by this one
        return newest

    def _settle(
        self,
        parts: RunParts,
        checkpoints: Checkpoints,
        state: PreferenceState,
        held: HeldOut,
        told: TrainingCallback,
    ) -> Scores:
        """Make the model the run's result: the best evaluation's where that is kept, else the last step's.

        Raises: RunStopped.
        """
        last, best = state.evaluation, state.best
        scores = _scores_of(last) if last and _is_measured(state) else held.tuned(told)
        if not (self._config.keep_best and best and not scores.loss <= best["loss"]):
            return scores
        step = int(best["step"])
        if not checkpoints.is_whole(step):
            told.on_log("warn", f"The best checkpoint, of step {step}, is damaged; using the last")
            return scores
        load_weights(parts.model, checkpoints.of_step(step))
        told.on_log("info", f"The result is step {step}, whose held-out loss was the lowest")
        state.kept_step = step
        return _scores_of(best)

    def _fingerprint(self, splits: Any, base: Path, schedule: Schedule) -> dict[str, Any]:
        own = {"method": self._config.method, "preference_beta": self._config.preference_beta}
        return {**super()._fingerprint(splits, base, schedule), **own}

    def _scores(
        self, state: PreferenceState, schedule: Schedule, tuned: Scores | None, last: StepMetrics | None
    ) -> dict[str, float | int | None]:
        return {
            "steps": state.step,
            "total_steps": schedule.total_steps,
            "epochs": round(schedule.epoch_of(state.step), 4),
            "train_loss": state.train_loss,
            "result_step": state.kept_step or state.step,
            "base_eval_loss": state.base_eval_loss,
            "eval_loss": tuned.loss if tuned else None,
            "base_reward_accuracy": state.base_reward_accuracy,
            "reward_accuracy": tuned.reward_accuracy if tuned else None,
            "base_reward_margin": state.base_reward_margin,
            "reward_margin": tuned.reward_margin if tuned else None,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": last.tokens_per_second if last else None,
            "peak_memory_bytes": last.peak_memory_bytes if last else None,
            "wall_s": round(time.monotonic() - self._began, 2),
        }


def _is_measured(state: RunState) -> bool:
    """Whether the last step has its evaluation."""
    return state.evaluation is not None and state.evaluation["step"] == state.step


def _scores_of(evaluation: Mapping[str, float]) -> Scores:
    return Scores(evaluation["loss"], evaluation["reward_accuracy"], evaluation["reward_margin"])


def _comparison(state: PreferenceState, tuned: Scores) -> str:
    before = state.base_reward_accuracy
    was = f", {before:.0%} before" if before is not None else ""
    return (
        f"On held-out preferences the better answer has the higher reward in {tuned.reward_accuracy:.0%} of "
        f"the comparisons{was}; mean margin {tuned.reward_margin:.3g}"
    )
