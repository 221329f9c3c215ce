"""A child process that does not outlive its parent."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path


def end_with_parent() -> None:
    """Die when standard input ends: the parent holds its other end and writes nothing.

    No pipe is no parent's: a program that was started by hand lives on.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def die_first(score: int = 1000) -> None:
    """Let the kernel take this process when memory runs out, and nobody else of a lower score."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError:
        return  # there is no such file but on Linux
