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
    ordered: Outcome | None,
    words: LastWords | None,
    exit_code: int,
    with_log: Callable[[str], str],
    *,
    has_checkpoint: bool,
) -> Ending:
    """`with_log` puts the tail of the child's log beside a message. `has_checkpoint`: to go on from."""
    if isinstance(words, DoneMessage) and exit_code == 0:
        # Its version is written: an order that came after its last step came too late.
        return Ending(Outcome.SUCCEEDED)
    if ordered is not None:
        return Ending(ordered)
    if isinstance(words, FailedMessage):
        return _failure(words, with_log, has_checkpoint=has_checkpoint)
    if isinstance(words, StoppedMessage):
        # Somebody else sent it SIGTERM; what it saved is as good as after a release.
        return Ending(Outcome.RELEASED)
    how = f"The training process ended without a result ({describe_exit(exit_code)})."
    outcome, message = fault(how, has_checkpoint=has_checkpoint)
    return Ending(outcome, TrainingFailedError.code, with_log(message))


def fault(message: str, *, has_checkpoint: bool) -> tuple[Outcome, str]:
    """How a run ends whose job is not known to be at fault: what it has trained waits for better days."""
    if not has_checkpoint:
        return Outcome.FAILED, message
    how = "Once that is put right, `sage finetune resume` goes on from the last checkpoint."
    return Outcome.SUSPENDED, f"{message}\n{how}"


def _failure(words: FailedMessage, with_log: Callable[[str], str], *, has_checkpoint: bool) -> Ending:
    outcome, message = Outcome.FAILED, words.message
    if words.code == StorageFullError.code:
        outcome = Outcome.SUSPENDED  # it takes nothing away, and what to do about it is said
    elif words.may_pass:
        outcome, message = fault(message, has_checkpoint=has_checkpoint)
    return Ending(outcome, words.code, message if words.is_explained else with_log(message), words.param)
