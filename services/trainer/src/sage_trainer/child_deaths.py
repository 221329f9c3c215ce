"""Children that died without last words: whether memory was the reason, and what the next one changes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from sage.tools.finetune.climbing import advice, read_rungs
from sage.tools.finetune.hardware import last_memory_words
from sage.tools.finetune.ladder import RESTARTING, climbed, next_rung
from sage_contracts.config import OomRung
from sage_contracts.errors import OutOfMemoryError
from sage_contracts.workers import Outcome, TrainClaim
from sage_servicekit.attempt import Ending
from sage_servicekit.children import describe_exit
from sage_trainer.folders import has_checkpoint

_ALLOCATION_FAILED = ("Cannot allocate memory", "can't allocate memory", "MemoryError")


class Cause(Enum):
    KERNEL = "the kernel killed the training process, because memory had run out"
    ALLOCATION = "the training process could not get the memory it asked for, and died"
    PROBABLY = "the training process was killed, probably because memory had run out"
    SOMEBODY = "the training process was killed, and not by the kernel for lack of memory"
    SIGNAL = "a signal ended the training process"
    OTHER = "the training process ended by itself"


def cause_of(exit_code: int, log: str, kernel_kills: int | None, unexplained_before: int) -> Cause:
    """What ended a child. `kernel_kills` are those for lack of memory since it began; None: unknown."""
    if exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        if kernel_kills:
            return Cause.KERNEL
        # Daemons that watch the memory kill too, and nothing counts what they do: one death may be somebody's
        # hand, two are taken for a lack of memory.
        return Cause.SOMEBODY if kernel_kills == 0 and not unexplained_before else Cause.PROBABLY
    if exit_code != 0 and (last_memory_words(log) or any(words in log for words in _ALLOCATION_FAILED)):
        return Cause.ALLOCATION
    if exit_code < 0:
        return Cause.SIGNAL
    return Cause.OTHER


@dataclass(frozen=True)
class NextChild:
    """How the run goes on in a new child."""

    rungs: tuple[OomRung, ...]
    message: str
    """What people are told."""


class ChildDeaths:
    """What one attempt has learnt from its children's deaths."""

    def __init__(
        self, claim: TrainClaim, checkpoints: Path, device: str, kills: Callable[[], int | None]
    ) -> None:
        self._claim = claim
        self._checkpoints = checkpoints
        self._device = device
        self._kills = kills
        self._kills_before: int | None = None
        self._unexplained = 0
        self._has_tried_again = False
        self._given: tuple[OomRung, ...] = ()

    def begin(self) -> None:
        """Before a child is started."""
        self._kills_before = self._kills()

    def after(self, exit_code: int, log: str) -> NextChild | Ending | None:
        """How to go on after a child that died without last words, or that its lack of memory is the end.

        None: it died of something else.
        """
        cause = cause_of(exit_code, log, self._new_kills(), self._unexplained)
        if cause is Cause.OTHER or (cause is Cause.SIGNAL and not self._may_try_again()):
            return None
        # The child writes down the rungs it takes by itself: they count too.
        taken = max(self._given, read_rungs(self._checkpoints, self._claim.job_id), key=len)
        config, rungs = climbed(self._claim.config, taken, device=self._device)
        what = f"{cause.value[0].upper()}{cause.value[1:]} ({describe_exit(exit_code)})."
        if cause in (Cause.SOMEBODY, Cause.SIGNAL):
            self._unexplained += cause is Cause.SOMEBODY
            self._has_tried_again |= cause is Cause.SIGNAL
            return NextChild(taken, f"{what} Starting it again from its last checkpoint.")
        can_quantise = find_spec("bitsandbytes") is not None
        rung = next_rung(config, taken, device=self._device, can_quantise=can_quantise)
        if rung is None:
            return Ending(Outcome.FAILED, OutOfMemoryError.code, advice(what, rungs, config))
        how = "from the start" if rung.name in RESTARTING else "from its last checkpoint"
        self._given = (*taken, rung.name)
        return NextChild(self._given, f"{what} Going on {how} with {rung.name}: {rung.change}.")

    def _may_try_again(self) -> bool:
        """A page of a disk that could not be read, or a driver's fault, may not come again; a bug does."""
        output_dir = self._checkpoints.parent
        return not self._has_tried_again and has_checkpoint(output_dir, self._claim.job_id)

    def _new_kills(self) -> int | None:
        now = self._kills()
        return None if now is None or self._kills_before is None else now - self._kills_before
