"""Finding and ending the processes that carry a stack's mark, whatever became of their parents."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Set
from pathlib import Path

STACK_MARK = "SAGE_STACK_ID"
PART_MARK = "SAGE_STACK_PART"
_PROC = Path("/proc")
_TERM_S, _KILL_S = 5.0, 5.0


def marked(stack_id: str, part: str | None = None) -> list[int]:
    """Living processes of ours whose environment names this stack (and part). Linux only; elsewhere empty."""
    wanted = {f"{STACK_MARK}={stack_id}".encode()}
    if part is not None:
        wanted.add(f"{PART_MARK}={part}".encode())
    found = []
    try:
        entries = list(_PROC.iterdir())
    except OSError:
        return []
    for entry in entries:
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        if _carries(entry, wanted) and not _is_zombie(entry):
            found.append(int(entry.name))
    return found


def is_marked(pid: int, stack_id: str) -> bool:
    """True for a process of this stack; where there is no /proc to tell by, for every one."""
    return not _PROC.exists() or _carries(_PROC / str(pid), {f"{STACK_MARK}={stack_id}".encode()})


def _carries(process: Path, wanted: Set[bytes]) -> bool:
    try:
        return wanted <= set((process / "environ").read_bytes().split(b"\0"))
    except OSError:
        return False  # gone meanwhile, or somebody else's


def is_alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(_PROC / str(pid))


def _is_zombie(process: Path) -> bool:
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("Z", "X")


def end_marked(stack_id: str, *, first_s: Mapping[str, float] | None = None) -> list[int]:
    """Ask all marked processes to stop, then kill the rest. Returns what still lives after that.

    The parts of `first_s` are asked before the others, whom they have news for, and given so many seconds.
    """
    for part, patience_s in (first_s or {}).items():
        _signal_marked(stack_id, signal.SIGTERM, patience_s, part)
    for sign, patience_s in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, _KILL_S)):
        if not _signal_marked(stack_id, sign, patience_s):
            return []
    return marked(stack_id)


def _signal_marked(
    stack_id: str, sign: signal.Signals, patience_s: float, part: str | None = None
) -> list[int]:
    """Returns what still lives after `patience_s`."""
    deadline = time.monotonic() + patience_s
    left = marked(stack_id, part)
    for pid in left:
        send(pid, sign)
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = marked(stack_id, part)
    return left


def send(pid: int, sign: int) -> None:
    """Signal a process that may be gone."""
    try:
        os.kill(pid, sign)
    except (ProcessLookupError, PermissionError):
        return
