"""TRL's steps of one run, and the way back when they go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sage.tools.finetune.batching import Schedule
from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.evaluation import RunStopped
from sage.tools.finetune.modeling import load_weights
from sage.tools.finetune.preferences.methods import make_trainer, save_last_step
from sage.tools.finetune.preferences.progress import Progress, StepFailed
from sage.tools.finetune.preferences.samples import PairSample, RatedSample
from sage.tools.finetune.preferences.scoring import Scores
from sage.tools.finetune.rollback import forget_lost_best, note_rollback
from sage.tools.finetune.run_parts import RunParts
from sage.tools.finetune.watchdog import Fault
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import TrainingFailedError

Rows = list[PairSample] | list[RatedSample]


@dataclass
class PreferenceState(RunState):
    base_reward_accuracy: float | None = None
    base_reward_margin: float | None = None

    def take_base(self, scores: Scores) -> None:
        self.base_eval_loss = scores.loss
        self.base_reward_accuracy = scores.reward_accuracy
        self.base_reward_margin = scores.reward_margin

    def keep_base_of(self, before: RunState) -> None:
        super().keep_base_of(before)
        if isinstance(before, PreferenceState):
            self.base_reward_accuracy = before.base_reward_accuracy
            self.base_reward_margin = before.base_reward_margin


@dataclass(frozen=True)
class Steps:
    """`run` goes from `progress.state` to the schedule's end; the state is another one after a way back."""

    config: TrainingConfig
    parts: RunParts
    rows: Rows
    schedule: Schedule
    checkpoints: Checkpoints
    progress: Progress[PreferenceState]
    callbacks: TrainingCallback

    def run(self, newest: Path | None) -> None:
        """`newest` is the checkpoint that the state is of. Raises: RunStopped, TrainingFailedError."""
        progress = self.progress
        if newest:
            self.callbacks.on_log("info", f"Resuming after step {progress.state.step}")
            load_weights(self.parts.model, newest)
            # It may have been stopped before its evaluation was done.
            progress.stopped = progress.evaluate_if_due()
        while not (progress.stopped or progress.has_ended_early or progress.is_done):
            fault = self._go_on(newest)
            if fault is None:
                return
            newest = self._roll_back(fault)

    def _go_on(self, newest: Path | None) -> Fault | None:
        """Take the steps; what went wrong, if anything. Its trainer dies with it: never are two in memory."""
        progress = self.progress
        trainer = make_trainer(
            self.config, self.parts, self.rows, self.schedule, self.checkpoints.folder, progress
        )
        try:
            # A checkpoint of step 0 only says what became of earlier tries.
            trainer.train(resume_from_checkpoint=str(newest) if newest and progress.state.step else None)
        except StepFailed as failure:
            return failure.fault
        except RunStopped as stop:
            if stop.mode == "stop":
                raise
            save_last_step(trainer, progress)
            progress.stopped = stop.mode
        return None

    def _roll_back(self, fault: Fault) -> Path:
        """The checkpoint to go on from. Raises: TrainingFailedError, when that was done often enough."""
        before, config = self.progress.state, self.config
        if len(before.rollbacks) >= config.max_rollbacks:
            raise TrainingFailedError(fault.advice(config.learning_rate, len(before.rollbacks)))
        target = self.checkpoints.newest_whole(self._warn, upto=before.good_step)
        # Its optimizer and random numbers are TRL's to restore; those of the start are ours.
        self.parts.restart()
        if target:
            load_weights(self.parts.model, target)
            state = self.checkpoints.read_state(target, PreferenceState)
        else:
            state = PreferenceState()
        forget_lost_best(state, self.checkpoints, keep_best=config.keep_best)
        self._warn(note_rollback(state, before, fault).text(config.learning_rate))
        self.checkpoints.drop_after(state.step)
        self.progress.state = state
        self.progress.saved_step = state.step
        # Whoever resumes from here has to know of it.
        return self.checkpoints.save_state(state, self.parts.model, like=target)

    def _warn(self, message: str) -> None:
        self.callbacks.on_log("warn", message)
