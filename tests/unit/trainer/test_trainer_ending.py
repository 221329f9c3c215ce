"""How an attempt ended, from what was ordered, said and seen."""

from __future__ import annotations

import pytest

from sage_contracts.jobs import JobMetrics
from sage_contracts.workers import Outcome
from sage_trainer.ending import LastWords, ending_of, stronger_order
from sage_trainer.messages import DoneMessage, FailedMessage, RestartMessage, StoppedMessage

DONE = DoneMessage(metrics=JobMetrics(), base_model="base", adapter_path="adapter")
STOPPED = StoppedMessage(step=3)
FAILED = FailedMessage(code="training_failed", message="ValueError: no")
EXPLAINED = FailedMessage(code="invalid_training_file", message="Row 7", param="data", is_explained=True)
PASSING = FailedMessage(code="model_not_found", message="away", is_explained=True, may_pass=True)
FULL = FailedMessage(code="insufficient_storage", message="The disk is full", is_explained=True)
CANCELLED, PAUSED, RELEASED = Outcome.CANCELLED, Outcome.PAUSED, Outcome.RELEASED


def with_log(message: str) -> str:
    return f"{message} [log]"


@pytest.mark.parametrize(
    ("ordered", "words", "exit_code", "outcome"),
    [
        (None, DONE, 0, Outcome.SUCCEEDED),
        (None, DONE, -11, Outcome.FAILED),
        (None, STOPPED, 0, RELEASED),
        (CANCELLED, STOPPED, 0, CANCELLED),
        (CANCELLED, DONE, 0, Outcome.SUCCEEDED),
        (CANCELLED, DONE, -9, CANCELLED),
        (CANCELLED, None, -9, CANCELLED),
        (PAUSED, STOPPED, 0, PAUSED),
        (PAUSED, DONE, 0, Outcome.SUCCEEDED),
        (PAUSED, None, -9, PAUSED),
        (PAUSED, RestartMessage(), 0, PAUSED),
        (RELEASED, None, -15, RELEASED),
        (RELEASED, DONE, 0, Outcome.SUCCEEDED),
        (None, None, 0, Outcome.FAILED),
        (None, FULL, 1, Outcome.SUSPENDED),
        (PAUSED, FULL, 1, PAUSED),
        (CANCELLED, FULL, 1, CANCELLED),
    ],
)
def test_outcomes(ordered: Outcome | None, words: LastWords | None, exit_code: int, outcome: Outcome) -> None:
    assert ending_of(ordered, words, exit_code, with_log, has_checkpoint=False).outcome is outcome


@pytest.mark.parametrize(
    ("ordered", "words", "exit_code", "outcome"),
    [
        (None, None, -7, Outcome.SUSPENDED),
        (None, None, 3, Outcome.SUSPENDED),
        (None, PASSING, 1, Outcome.SUSPENDED),
        (None, FULL, 1, Outcome.SUSPENDED),
        (None, FAILED, 1, Outcome.FAILED),
        (None, EXPLAINED, 1, Outcome.FAILED),
        (CANCELLED, None, -7, CANCELLED),
        (PAUSED, PASSING, 1, PAUSED),
        (None, DONE, 0, Outcome.SUCCEEDED),
    ],
)
def test_outcomes_of_a_run_with_a_checkpoint(
    ordered: Outcome | None, words: LastWords | None, exit_code: int, outcome: Outcome
) -> None:
    assert ending_of(ordered, words, exit_code, with_log, has_checkpoint=True).outcome is outcome


@pytest.mark.parametrize(("words", "exit_code"), [(PASSING, 1), (None, -7)])
def test_a_run_that_may_go_on_says_how(words: LastWords | None, exit_code: int) -> None:
    endings = [ending_of(None, words, exit_code, with_log, has_checkpoint=has) for has in (True, False)]
    assert [ending.outcome for ending in endings] == [Outcome.SUSPENDED, Outcome.FAILED]
    with_one, without = (ending.error_message or "" for ending in endings)
    assert "`sage finetune resume` goes on from the last checkpoint" in with_one
    assert "resume" not in without


@pytest.mark.parametrize(
    ("words", "exit_code", "code", "message"),
    [
        (FAILED, 1, "training_failed", "ValueError: no [log]"),
        (EXPLAINED, 1, "invalid_training_file", "Row 7"),
        (None, -9, "training_failed", "signal SIGKILL"),
        (None, -11, "training_failed", "signal SIGSEGV"),
        (None, 3, "training_failed", "exit code 3"),
    ],
)
def test_failures(words: LastWords | None, exit_code: int, code: str, message: str) -> None:
    ending = ending_of(None, words, exit_code, with_log, has_checkpoint=False)
    assert ending.error_code == code
    assert ending.error_message is not None
    assert message in ending.error_message
    assert ending.error_param == ("data" if words is EXPLAINED else None)


@pytest.mark.parametrize(
    ("known", "new", "counts"),
    [
        (None, RELEASED, RELEASED),
        (RELEASED, PAUSED, PAUSED),
        (PAUSED, CANCELLED, CANCELLED),
        (CANCELLED, RELEASED, CANCELLED),
        (PAUSED, RELEASED, PAUSED),
    ],
)
def test_the_stronger_order_counts(known: Outcome | None, new: Outcome, counts: Outcome) -> None:
    assert stronger_order(known, new) is counts
