"""What an engine's log says: how far a start has come, and what went wrong first."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable

_TAIL_LINES = 400
# Errors further apart than this have different causes.
_BURST_S = 10.0

# Decoration in front of the message: "(EngineCore pid=12) ERROR 11-24 09:14:06 [core.py:866] ".
_PREFIX = re.compile(
    r"^(\([\w ]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]*\]\s?)?"
)
_EXCEPTION = re.compile(r"^(?P<name>(?:\w+\.)*\w*(?:Error|Exception|Interrupt))(?:: (?P<text>.*))?$")
# A C extension that does not load is logged as a warning; the error that it causes comes minutes later.
_EXTENSION = re.compile(r"Failed to import from vllm\._C.*")
_USAGE = re.compile(r"(^|\s)error: (?P<text>.*)$")
_FATAL = re.compile(r"EngineCore failed to start|Engine core initialization failed|EngineDeadError")
PORT_TAKEN = re.compile(r"address already in use", re.IGNORECASE)

# In the order in which they appear; the last one seen is the phase.
_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"non-default args"), "reading the configuration"),
    (re.compile(r"Resolved architecture"), "preparing the engine"),
    (re.compile(r"Starting to load model|Loading (safetensors|weights|model)"), "loading weights"),
    (re.compile(r"Dynamo bytecode transform|Compiling a graph"), "compiling"),
    (re.compile(r"KV cache"), "reserving the cache"),
    (re.compile(r"[Cc]apturing (CUDA )?graph"), "capturing graphs"),
    (re.compile(r"Starting vLLM (API )?server|Application startup complete"), "opening its port"),
)


class EngineLog:
    """Reads an engine's lines as they come and keeps what explains them: phase, first error, the tail."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = "importing libraries"
        self.first_error: str | None = None
        self.is_fatal = False
        """The engine said that it cannot start, though its process may linger."""
        self.is_port_taken = False
        self.lines = 0
        """How many it has said."""
        self._clock = clock
        self._is_serving = False
        self._error_at = 0.0
        self._in_traceback = False
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def add(self, raw: str) -> None:
        line = _PREFIX.sub("", raw.rstrip())
        if not line.strip():
            return
        self._tail.append(line)
        self.lines += 1
        self.phase = next((name for pattern, name in _PHASES if pattern.search(line)), self.phase)
        self.is_fatal = self.is_fatal or bool(_FATAL.search(line))
        self.is_port_taken = self.is_port_taken or bool(PORT_TAKEN.search(line))
        self._look_for_error(line.strip())

    def start_serving(self) -> None:
        """From here on, errors may belong to requests that the engine refused and survived."""
        self._is_serving = True
        self.first_error = None

    def _look_for_error(self, line: str) -> None:
        """The first error is the cause: what follows it in a chain only reports that it happened."""
        error = self._error_in(line)
        if error is None:
            return
        is_new_burst = self._is_serving and self._clock() - self._error_at > _BURST_S
        self._error_at = self._clock()
        if self.first_error is None or is_new_burst:
            self.first_error = error

    def _error_in(self, line: str) -> str | None:
        if extension := _EXTENSION.search(line):
            return extension.group()
        if line.startswith("Traceback (most recent call last)"):
            self._in_traceback = True
            return None
        exception = _EXCEPTION.match(line)
        if exception and (self._in_traceback or exception["text"]):
            self._in_traceback = False
            return line
        usage = _USAGE.search(line)
        return usage["text"] if usage and not self._in_traceback else None

    @property
    def tail(self) -> list[str]:
        return list(self._tail)

    def root_cause(self, exit_code: int | None) -> str:
        """One line that says why the engine is gone."""
        is_signal = exit_code is not None and exit_code < 0
        is_recent = self._clock() - self._error_at <= _BURST_S
        if self.first_error is not None and (not self._is_serving or (is_recent and not is_signal)):
            return self.first_error
        if exit_code is not None and exit_code < 0:
            hint = "; the machine may be out of memory" if exit_code == -9 else ""
            return f"ended by signal {-exit_code}{hint}"
        last = self._tail[-1].strip() if self._tail else "nothing was logged"
        return f"exit code {exit_code}; last line: {last}" if exit_code is not None else last
