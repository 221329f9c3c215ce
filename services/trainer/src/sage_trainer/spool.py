"""News on their way to the orchestrator: kept while it is silent, within a bound."""

from __future__ import annotations

from sage_contracts.jobs import EventLevel
from sage_contracts.workers import CheckpointReport, EventReport

MAX_BATCH = 500
"""Events per report, so that a long silence does not end in one request that is too large."""


class Spool:
    """Events and checkpoints in order. Of too many events the oldest metrics go first, then messages."""

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._events: list[EventReport] = []
        self._checkpoints: list[CheckpointReport] = []
        self._dropped = 0
        self._count = 0
        self._on_the_way = (0, 0)
        self.is_urgent = False
        """Something came that people wait for: report at once."""

    def __len__(self) -> int:
        return len(self._events) + len(self._checkpoints)

    def add(self, event: EventReport, *, is_urgent: bool = False) -> None:
        # Under its number an event that was sent twice is recognised.
        self._count += 1
        self._events.append(event.model_copy(update={"seq": self._count}))
        self.is_urgent = self.is_urgent or is_urgent
        if len(self._events) > self._max_events:
            self._drop_oldest()

    def add_checkpoint(self, checkpoint: CheckpointReport) -> None:
        self._checkpoints.append(checkpoint)

    def batch(self) -> tuple[list[EventReport], list[CheckpointReport]]:
        """What the next report carries. It stays here until `sent`."""
        self.is_urgent = False
        events = self._events[:MAX_BATCH]
        self._on_the_way = (len(events), len(self._checkpoints))
        if self._dropped:
            lost = f"{self._dropped} events were dropped while the orchestrator did not answer"
            first = events[0]
            note = EventReport(
                created_at=first.created_at, level=EventLevel.WARN, message=lost, seq=first.seq
            )
            events = [note, *events]
        return events, list(self._checkpoints)

    def sent(self) -> None:
        """The last batch arrived (or will never be accepted): forget it."""
        events, checkpoints = self._on_the_way
        del self._events[:events]
        del self._checkpoints[:checkpoints]
        self._on_the_way = (0, 0)
        self._dropped = 0

    def _drop_oldest(self) -> None:
        metrics = (index for index, event in enumerate(self._events) if event.type == "metrics")
        del self._events[next(metrics, 0)]
        self._dropped += 1
