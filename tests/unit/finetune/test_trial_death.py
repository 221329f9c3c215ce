"""How the end of a trial's process is understood."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sage.tools.finetune.trial_step import TrialSpec, try_step
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import OutOfMemoryError, StorageFullError, TrainingFailedError

SPEC = TrialSpec(config=TrainingConfig(), base="base", longest=[], typical=[])


def ending(code: str, timeout_s: float = 60) -> None:
    try_step(SPEC, program=[sys.executable, "-c", code], timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed"),
        ("import sys; print('CUDA out of memory', file=sys.stderr); sys.exit(75)", "CUDA out of memory"),
        ("import sys; print('std::bad_alloc', file=sys.stderr); sys.exit(134)", "was killed"),
        ("import sys; sys.exit('Error out of memory at line 60 in file /src/csrc/ops.cu')", "was killed"),
    ],
)
def test_a_lack_of_memory_is_told_from_other_ends(code: str, words: str) -> None:
    with pytest.raises(OutOfMemoryError, match=words):
        ending(code)


def test_other_ends_quote_the_last_line() -> None:
    with pytest.raises(TrainingFailedError, match="failed: ValueError: no") as caught:
        ending("raise ValueError('no')")
    assert not isinstance(caught.value, OutOfMemoryError)
    with pytest.raises(TrainingFailedError, match="exit code 3"):
        ending("raise SystemExit(3)")


def test_a_full_disk_is_no_lack_of_memory() -> None:
    with pytest.raises(StorageFullError, match="The disk is full"):
        ending("import sys; print('The disk is full.', file=sys.stderr); sys.exit(74)")


def test_a_trial_that_hangs_is_ended() -> None:
    with pytest.raises(TrainingFailedError, match="did not end"):
        ending("import threading; threading.Event().wait()", timeout_s=0.1)


# The thread that watches ends only where standard input does, and the process with it.
WATCHED = """
import threading
from sage_contracts.lifeline import end_with_parent
end_with_parent()
for thread in threading.enumerate():
    if thread.name == "lifeline":
        thread.join()
"""


@pytest.mark.parametrize(("stdin", "code"), [(subprocess.DEVNULL, 0), (subprocess.PIPE, 1)])
def test_a_parent_is_one_who_holds_a_pipe(stdin: int, code: int) -> None:
    """A program that is started by hand with no input lives on."""
    with subprocess.Popen([sys.executable, "-c", WATCHED], stdin=stdin) as child:
        try:
            child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == code
