"""What a child says becomes events for people and metrics for the record."""

from __future__ import annotations

from math import nan

import pytest

from sage_contracts.jobs import JobMetrics
from sage_trainer.messages import (
    CHILD_MESSAGE,
    CheckpointMessage,
    DoneMessage,
    EvalMessage,
    FailedMessage,
    LogMessage,
    PhaseMessage,
    StepMessage,
    StoppedMessage,
)
from sage_trainer.news import News
from sage_trainer.spool import Spool


@pytest.fixture
def news() -> News:
    return News(Spool(100), logging_steps=5)


def texts(news: News) -> list[str]:
    return [event.message for event in news.spool.batch()[0]]


def test_of_the_steps_some_are_told_and_the_last_always_but_all_are_known(news: News) -> None:
    for step in range(1, 13):
        news.take_in(StepMessage(step=step, total_steps=12, loss=1 / step))
        assert news.metrics.step == step
    assert not news.spool.is_urgent
    assert texts(news) == ["Step 5/12 loss 0.2", "Step 10/12 loss 0.1", "Step 12/12 loss 0.08333"]
    assert news.spool.batch()[0][0].data == {"step": 5, "total_steps": 12, "train_loss": 0.2}


def test_a_step_of_an_earlier_attempt_is_told_as_that_one_logged_it(news: News) -> None:
    news.take_in(StepMessage(step=12, loss=0.5, is_repeated=True))
    assert texts(news) == ["Step 12 loss 0.5"]
    assert news.spool.batch()[0][0].data == {"step": 12, "train_loss": 0.5}


def test_a_steps_accuracy_has_openais_name_in_its_event(news: News) -> None:
    news.take_in(EvalMessage(of="step", step=4, loss=1.5, token_accuracy=0.5))
    news.take_in(StepMessage(step=5, total_steps=12, loss=0.2, train_token_accuracy=0.75))
    assert news.spool.batch()[0][1].data == {
        "step": 5, "total_steps": 12, "train_loss": 0.2, "train_mean_token_accuracy": 0.75,
    }  # fmt: skip
    assert (news.metrics.train_token_accuracy, news.metrics.token_accuracy) == (0.75, 0.5)


@pytest.mark.parametrize(
    ("of", "name"), [("base", "base_eval_loss"), ("step", "eval_loss"), ("tuned", "eval_loss")]
)
def test_a_measurement_is_urgent_and_known_by_what_was_measured(news: News, of: str, name: str) -> None:
    news.take_in(EvalMessage.model_validate({"of": of, "step": 4, "loss": 1.5}))
    assert news.spool.is_urgent
    assert news.metrics.model_dump(exclude_none=True) == {name: 1.5}
    assert texts(news) == [f"Held-out loss of the {of} model: 1.5000"]


def test_a_loss_that_is_no_number_is_told(news: News) -> None:
    line = EvalMessage(of="step", step=4, loss=nan).model_dump_json()
    said = CHILD_MESSAGE.validate_json(line)
    assert isinstance(said, EvalMessage)
    news.take_in(said)
    assert texts(news) == ["Held-out loss of the step model: no number"]
    assert news.metrics.eval_loss is None


def test_a_saved_checkpoint_is_told_twice_to_people_and_to_the_record(news: News) -> None:
    news.take_in(CheckpointMessage(step=7, path="checkpoints/7", train_loss=0.5))
    events, (checkpoint,) = news.spool.batch()
    assert [event.message for event in events] == ["Checkpoint of step 7 saved"]
    assert (checkpoint.step, checkpoint.path, checkpoint.train_loss) == (7, "checkpoints/7", 0.5)


def test_a_checkpoint_of_an_earlier_attempt_is_recorded_without_an_event(news: News) -> None:
    news.take_in(CheckpointMessage(step=7, path="checkpoints/7", is_repeated=True))
    events, (checkpoint,) = news.spool.batch()
    assert events == []
    assert checkpoint.step == 7


def test_a_phase_is_urgent_and_a_line_of_the_log_is_not(news: News) -> None:
    news.take_in(LogMessage(message="as you like it"))
    assert not news.spool.is_urgent
    news.take_in(PhaseMessage(name="data"))
    assert news.spool.is_urgent
    assert texts(news) == ["as you like it", "data"]
    assert news.metrics.phase == "data"


@pytest.mark.parametrize(
    "words", [StoppedMessage(step=3), FailedMessage(code="training_failed", message="no")]
)
def test_last_words_are_kept_for_the_end_and_are_no_event(
    news: News, words: StoppedMessage | FailedMessage
) -> None:
    news.take_in(words)
    assert news.last_words == words
    assert texts(news) == []


def test_what_is_known_at_the_end_is_added_to_what_was_known_before(news: News) -> None:
    news.take_in(StepMessage(step=3, total_steps=3, loss=0.5))
    news.take_in(DoneMessage(metrics=JobMetrics(eval_loss=0.4), base_model="base"))
    assert news.metrics.eval_loss == 0.4
    assert news.metrics.step == 3
