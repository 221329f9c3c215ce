"""How an attempt ended: a function of what was ordered, what the child said last, and how it died."""

from __future__ import annotations

from collections.abc import Callable

from sage_contracts.errors import StorageFullError, TrainingFailedError
from sage_contracts.workers import Outcome
from sage_servicekit.attempt import Ending
from sage_servicekit.children import describe_exit
from sage_trainer.messages import DoneMessage, FailedMessage, RestartMessage, StoppedMessage

LastWords = DoneMessage | StoppedMessage | RestartMessage | FailedMessage


def stronger_order(known: Outcome | None, new: Outcome) -> Outcome:
    """Of two reasons to stop the one that counts: a cancel before a pause, a pause before a release."""
    rank = [None, Outcome.RELEASED, Outcome.PAUSED, Outcome.CANCELLED]
    return new if known is None or rank.index(new) > rank.index(known) else known


def ending_of(
    ordered: Outcome | None, words: LastWords | None, exit_code: int, with_log: Callable[[str], str]
) -> Ending:
    """`with_log` puts the tail of the child's log beside a message."""
    if ordered is Outcome.CANCELLED:
        return Ending(Outcome.CANCELLED)
    if isinstance(words, DoneMessage) and exit_code == 0:
        return Ending(Outcome.SUCCEEDED)
    if ordered is not None:
        return Ending(ordered)
    if isinstance(words, FailedMessage):
        message = words.message if words.is_explained else with_log(words.message)
        # A full disk takes nothing away: the run goes on from its last checkpoint once there is room.
        outcome = Outcome.SUSPENDED if words.code == StorageFullError.code else Outcome.FAILED
        return Ending(outcome, words.code, message, words.param)
    if isinstance(words, StoppedMessage):
        # Somebody else sent it SIGTERM; what it saved is as good as after a release.
        return Ending(Outcome.RELEASED)
    return _death(exit_code, with_log)


def _death(exit_code: int, with_log: Callable[[str], str]) -> Ending:
    """An end without last words."""
    how = describe_exit(exit_code)
    message = f"The training process ended without a result ({how})."
    return Ending(Outcome.FAILED, TrainingFailedError.code, with_log(message))
