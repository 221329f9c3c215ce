"""Which evaluation between steps is the best, and when there were enough that were not."""

from __future__ import annotations

from math import inf, isfinite, nan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.callbacks import TrainingCallback
from sage.tools.finetune.checkpoints import Checkpoints, RunState
from sage.tools.finetune.comparison import Comparison
from sage.tools.finetune.evaluation import HeldOut
from sage.tools.finetune.loop import early_end_text, note_evaluation
from sage_contracts.config import TrainingConfig

losses = st.lists(st.floats(0, 12) | st.sampled_from([nan, inf]), min_size=1, max_size=30)


@given(losses)
def test_the_best_is_the_lowest_number_and_the_first_of_its_kind(measured: list[float]) -> None:
    state = RunState()
    for loss in measured:
        state.step += 1
        note_evaluation(state, loss, 0, {})
    numbers = [loss for loss in measured if isfinite(loss)]
    if not numbers:
        assert state.best is None
        return
    assert state.best is not None
    assert state.best["loss"] == min(numbers)
    assert state.best["step"] == 1 + measured.index(min(numbers))


def test_a_run_that_improves_after_a_loss_that_was_no_number_goes_on() -> None:
    state = RunState()
    assert [note_evaluation(state, loss, 2, {}) for loss in (nan, 3.0, 2.0, 1.0)] == [False, True, True, True]
    assert not state.has_ended_early


@given(st.integers(1, 5))
def test_patience_ends_what_never_gives_a_number_and_says_why(patience: int) -> None:
    state = RunState(step=9)
    for _ in range(patience):
        assert not state.has_ended_early
        note_evaluation(state, nan, patience, {})
    assert state.has_ended_early
    assert "no number" in early_end_text(state)


def test_the_end_names_the_loss_that_was_not_reached() -> None:
    state = RunState(step=9)
    for loss in (1.25, 2.0):
        note_evaluation(state, loss, 1, {})
    assert early_end_text(state).endswith("1 evaluations in a row were no better than 1.2500")


class Warnings(TrainingCallback):
    def __init__(self) -> None:
        self.told: list[str] = []

    def on_log(self, level: str, message: str) -> None:
        self.told.append(message)


@pytest.mark.parametrize(("last", "goes_back"), [(nan, True), (2.0, True), (1.0, False)])
def test_at_the_end_the_best_is_gone_back_to_from_what_is_worse_or_no_number(
    last: float, goes_back: bool, tmp_path: Path
) -> None:
    state = RunState(step=9, answered_step=9, best={"step": 5, "loss": 1.0, "token_accuracy": 0.5})
    state.evaluation = {"step": 9, "loss": last, "token_accuracy": 0.5}
    warnings = Warnings()
    held = HeldOut(None, None, None, (), (), 1, warnings)  # type: ignore[arg-type]
    Comparison(TrainingConfig(keep_best=True), held).settle(Checkpoints(tmp_path, {}), state)
    assert ["best checkpoint, of step 5" in text for text in warnings.told] == [True] * goes_back
