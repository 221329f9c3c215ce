"""News waits for the orchestrator in order and within a bound."""

from __future__ import annotations

from sage_contracts.workers import CheckpointReport, EventReport
from sage_trainer.spool import MAX_BATCH, Spool


def message(number: int) -> EventReport:
    return EventReport(created_at=number, message=f"message {number}")


def metrics(number: int) -> EventReport:
    return EventReport(created_at=number, message=f"step {number}", type="metrics")


def texts(spool: Spool) -> list[str]:
    return [event.message for event in spool.batch()[0]]


def test_a_batch_stays_until_it_was_sent() -> None:
    spool = Spool(10)
    spool.add(message(1))
    spool.add_checkpoint(CheckpointReport(step=1, path="c"))
    assert texts(spool) == texts(spool) == ["message 1"]
    spool.batch()
    spool.sent()
    assert spool.batch() == ([], [])
    assert len(spool) == 0


def test_what_comes_while_a_batch_is_on_its_way_is_kept() -> None:
    spool = Spool(10)
    spool.add(message(1))
    spool.batch()
    spool.add(message(2))
    spool.sent()
    assert texts(spool) == ["message 2"]


def test_of_too_many_the_oldest_metrics_go_first_and_the_loss_is_told_once() -> None:
    spool = Spool(3)
    for event in (message(1), metrics(2), metrics(3), message(4), metrics(5)):
        spool.add(event)
    told = "2 events were dropped while the orchestrator did not answer"
    assert texts(spool) == [told, "message 1", "message 4", "step 5"]
    spool.batch()
    spool.sent()
    assert texts(spool) == []


def test_without_metrics_the_oldest_messages_go() -> None:
    spool = Spool(2)
    for number in range(4):
        spool.add(message(number))
    assert texts(spool)[1:] == ["message 2", "message 3"]


def test_a_long_silence_is_sent_in_batches() -> None:
    spool = Spool(2 * MAX_BATCH)
    for number in range(MAX_BATCH + 7):
        spool.add(metrics(number))
    assert len(spool.batch()[0]) == MAX_BATCH
    spool.sent()
    assert len(spool.batch()[0]) == 7


def test_urgency_lasts_until_the_next_batch() -> None:
    spool = Spool(10)
    spool.add(message(1), is_urgent=True)
    spool.add(message(2))
    assert spool.is_urgent
    spool.batch()
    assert not spool.is_urgent


def test_events_are_numbered_once_however_often_they_are_sent() -> None:
    spool = Spool(10)
    spool.add(message(1))
    spool.batch()
    spool.add(message(2))
    # The answer to the first report was lost: both go out, under the numbers they had.
    assert [event.seq for event in spool.batch()[0]] == [1, 2]
    spool.sent()
    spool.add(message(3))
    assert [event.seq for event in spool.batch()[0]] == [3]


def test_the_note_about_lost_events_goes_with_the_first_that_was_kept() -> None:
    spool = Spool(1)
    for number in range(3):
        spool.add(message(number))
    assert [event.seq for event in spool.batch()[0]] == [3, 3]
