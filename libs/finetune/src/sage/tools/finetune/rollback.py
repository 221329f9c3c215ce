"""Which checkpoints a run may go back to, and what is different once it has. No torch."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite

from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.watchdog import PROVEN_AFTER, Fault, Rollback, Verdict
from sage_contracts.errors import TrainingFailedError


def judge(state: RunState, loss: float) -> Verdict:
    """Let the watchdog see a step's loss, and prove the checkpoint that waits for it."""
    verdict = state.watch.see(loss)
    # The update behind a checkpoint shows only in later losses.
    if state.candidate_step is not None and state.step >= state.candidate_step + PROVEN_AFTER:
        if state.watch.is_calm:
            state.good_step = state.candidate_step
        state.candidate_step = None
    return verdict


def propose(state: RunState) -> None:
    """The checkpoint that is about to be written may prove good, unless an earlier one is yet to."""
    if state.candidate_step is None and state.watch.is_calm:
        state.candidate_step = state.step


def wanted_steps(state: RunState, *, keep_best: bool) -> list[int]:
    """Of the checkpoints that have to stay, however old they are."""
    proving = [step for step in (state.good_step, state.candidate_step) if step]
    return [*([int(state.best["step"])] if state.best and keep_best else []), *proving]


def forget_lost_best(state: RunState, checkpoints: Checkpoints, *, keep_best: bool) -> None:
    """The best of a state gone back to may have been deleted since, for a better one that is gone as well.

    Without its weights it would only keep every later one from becoming the best.
    """
    if state.best and keep_best and not checkpoints.is_whole(int(state.best["step"])):
        state.best = None


def note_rollback(state: RunState, before: RunState, fault: Fault) -> Rollback:
    """Enter into `state`, of the step gone back to, how `before` ended; the learning rate is lower now."""
    made = fault.rollback(state.step, before.rate_scale)
    state.keep_base_of(before)
    state.good_step = state.step
    state.rate_scale = made.rate_scale
    state.rollbacks = [*before.rollbacks, asdict(made)]
    return made


def require_number(held_out_loss: float, state: RunState, learning_rate: float) -> None:
    """What the last step did shows in no loss of training, only here.

    Raises: TrainingFailedError for a result whose loss is no number, where the base's was one.
    """
    base = state.base_eval_loss
    if not isfinite(held_out_loss) and base is not None and isfinite(base):
        fault = Fault("nan", state.step, held_out_loss)
        raise TrainingFailedError(fault.advice(learning_rate, len(state.rollbacks)))
