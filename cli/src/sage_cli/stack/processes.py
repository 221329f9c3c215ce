"""Finding and ending the processes that carry a stack's mark, whatever became of their parents."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

STACK_MARK = "SAGE_STACK_ID"


def marked(stack_id: str) -> list[int]:
    """Living processes of ours whose environment names this stack. Linux only; elsewhere empty."""
    wanted = f"{STACK_MARK}={stack_id}".encode()
    found = []
    try:
        entries = list(Path("/proc").iterdir())
    except OSError:
        return []
    for entry in entries:
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and not _is_zombie(entry):
                found.append(int(entry.name))
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return found


def is_alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(Path(f"/proc/{pid}"))


def _is_zombie(process: Path) -> bool:
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("Z", "X")


def end_marked(stack_id: str, *, term_s: float = 5.0, kill_s: float = 5.0) -> list[int]:
    """Ask all marked processes to stop, then kill the rest. Returns what still lives after that."""
    for sign, patience_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        deadline = time.monotonic() + patience_s
        left = marked(stack_id)
        for pid in left:
            _send(pid, sign)
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = marked(stack_id)
        if not left:
            return []
    return marked(stack_id)


def _send(pid: int, sign: int) -> None:
    try:
        os.kill(pid, sign)
    except (ProcessLookupError, PermissionError):
        return
