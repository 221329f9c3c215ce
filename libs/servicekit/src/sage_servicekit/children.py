"""A child process that can be watched, stopped and lost without losing its parent.

Parent and child are joined by two pipes. Standard output carries the child's messages, a line each, and is
always drained by a thread, so that a slow parent never blocks the child. Standard input carries nothing, or
the order that a child waits for: it ends when the parent dies, however it dies, and the child then ends
itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

_MAX_LINE_BYTES = 1_000_000
_MAX_LINES = 10_000
"""Received at once, so that a chattering child cannot keep its parent from anything else."""
MAX_LOG_BYTES = 10_000_000
"""A larger log is set aside when a child starts, in place of the one that was before."""
_POLL_S = 0.2
"""How long an ended child may go unnoticed while it says nothing."""


class Child:
    """One child in its own process group. As a context manager it never outlives its block."""

    def __init__(
        self, command: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Raises: OSError when the program cannot be started or the log not written."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        begin_log(log_path)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._kill_at: float | None = None
        self.was_killed = False
        """True once the whole group got SIGKILL from us while the child was alive."""
        assert self._process.stdout is not None
        self._drain = threading.Thread(
            target=self._read_lines, args=(self._process.stdout,), name=f"drain-{self.pid}", daemon=True
        )
        self._drain.start()

    def _read_lines(self, stream: IO[bytes]) -> None:
        while line := stream.readline(_MAX_LINE_BYTES):
            self._lines.put(line)

    def order(self, line: bytes) -> None:
        """Write one line to its standard input. Raises: OSError when it is dead."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.rstrip(b"\n") + b"\n")
        self._process.stdin.flush()

    def receive(self, timeout_s: float) -> list[bytes]:
        """The lines that wait, or the next one; empty when `timeout_s` passed or the child ended mute."""
        deadline = time.monotonic() + max(0.0, timeout_s)
        lines: list[bytes] = []
        while not lines:
            left_s = deadline - time.monotonic()
            try:
                lines.append(self._lines.get(timeout=max(0.0, min(_POLL_S, left_s))))
            except queue.Empty:
                if left_s <= 0 or self.has_ended():
                    return []
        while len(lines) < _MAX_LINES and not self._lines.empty():
            lines.append(self._lines.get())
        return lines

    def has_ended(self) -> bool:
        """True once the child is dead; carries out the kill that `stop` has scheduled. Does not reap."""
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self.kill()
        return self._process.returncode is not None or _is_zombie(self.pid)

    def stop(self, grace_s: float) -> None:
        """SIGTERM now; SIGKILL to the whole group once `grace_s` are over. Asking again changes nothing."""
        if self._kill_at is None and not self.has_ended():
            self._kill_at = time.monotonic() + grace_s
            # The child alone: its own workers must live until it has saved.
            self._signal(os.kill, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        if self._process.returncode is None and not _is_zombie(self.pid):
            self.was_killed = True
        self._signal(os.killpg, signal.SIGKILL)

    def reap(self) -> int:
        """Kill what is left of the group, wait, and return the exit code (negative: the signal)."""
        # Before waiting: the unreaped leader keeps its number from being given to somebody else's group.
        self._signal(os.killpg, signal.SIGKILL)
        code = self._process.wait()
        self._drain.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not (pipe is self._process.stdout and self._drain.is_alive()):
                pipe.close()
        return code

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reap()


def _is_zombie(pid: int) -> bool:
    """Whether our child has ended and waits to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def end_with_parent() -> queue.SimpleQueue[bytes]:
    """In the child, before anything heavy is imported: die with all one's group when the parent is gone.

    Returns where the lines arrive that the parent writes. A parent-death signal would not do: it fires when
    the *thread* that spawned the child ends.
    """
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return orders  # started by hand

    def watch() -> None:
        unread = b""
        while block := os.read(0, 4096):
            *lines, unread = (unread + block).split(b"\n")
            for line in lines:
                orders.put(line)
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return orders


def begin_log(path: Path) -> int:
    """Where a child's words will begin in its log, behind what is there; a log that is large is set aside.

    Raises: OSError.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    if size <= MAX_LOG_BYTES:
        return size
    path.replace(path.with_name(f"{path.name}.1"))
    return 0


def append_output_to(path: Path) -> None:
    """In the child: from now on standard error, and what is printed, go to this log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def take_stdout() -> IO[str]:
    """In the child: keep standard output for messages; what anything else prints goes to standard error."""
    sys.stdout.flush()
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return messages


def computing_env(home: Path, threads: int) -> dict[str, str]:
    """The environment of a child that computes on so many threads."""
    return {
        **os.environ,
        "SAGE_HOME": str(home),
        # Unset, every library starts a thread per core of the host, and they spin against each other.
        "OMP_NUM_THREADS": str(threads),
        # Spinning while they wait costs others on a busy machine 3 to 5 times their time.
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def describe_exit(code: int) -> str:
    """An exit code for people: `exit code 3`, `signal SIGSEGV`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def tail(path: Path, *, since_byte: int = 0, max_lines: int = 20, max_bytes: int = 8_000) -> str:
    """The last lines of a log from `since_byte` on; empty when there are none."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(since_byte, size - max_bytes))
            text = stream.read(max_bytes).decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-max_lines:])
