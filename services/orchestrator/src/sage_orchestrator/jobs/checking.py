"""Training files are checked beside this process, which lives on whatever is in one."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from pydantic import BaseModel

from sage_contracts.config import Task
from sage_contracts.errors import ErrorBody, InvalidDataError, ServiceUnavailableError, from_body
from sage_contracts.home import Home
from sage_orchestrator.jobs.datafile import check_data
from sage_servicekit.children import Child, describe_exit

_HARMLESS_BYTES = 64 << 10
"""Read in this process: starting another would take longer than a request for such a file does."""
_PATIENCE_S = 1.0
"""How long a request waits for the check of another."""
_BACKGROUND_NICENESS = 5
_LOOK_S = 0.1
"""How long a stop, or a child that takes too much memory, may go unnoticed."""


class DataFile(BaseModel):
    """What is to be checked, and what for."""

    home: Path
    path: Path
    filename: str
    task: Task
    method: str
    model: str
    is_held_out: bool

    def check(self) -> None:
        """In this process. Raises: as `check_data`."""
        check_data(
            self.path,
            self.filename,
            self.task,
            self.method,
            self.model,
            Home(self.home),
            is_held_out=self.is_held_out,
        )


class Verdict(BaseModel):
    """The child's one line."""

    error: ErrorBody | None = None


class OutOfTimeError(InvalidDataError):
    """What the file says could not be found out within the time given."""


def out_of_memory(filename: str, memory_bytes: int) -> InvalidDataError:
    return InvalidDataError(
        f"{filename} could not be checked within {memory_bytes >> 20:,} MiB of memory: split it, shorten its "
        "longest rows, or raise SAGE_CHECK_MEMORY_BYTES."
    )


class FileChecks:
    """Each in a child with limits of memory and time: at most one for requests, and one in the background."""

    def __init__(self, home: Home, *, memory_bytes: int, timeout_s: float, at_once_s: float) -> None:
        """`at_once_s` is how long the check for a request may take."""
        self._log_path = home.logs / "checks.log"
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        self._at_once_s = min(at_once_s, timeout_s)
        self._for_requests = threading.Lock()
        self._stopping = threading.Event()

    def check_at_once(self, file: DataFile) -> bool:
        """Whether it was checked in the time that a request may take. Raises: as `check`."""
        if _is_harmless(file):
            file.check()
            return True
        if not self._for_requests.acquire(timeout=_PATIENCE_S):
            return False
        try:
            self._check(file, self._at_once_s, niceness=0)
        except OutOfTimeError:
            return False
        finally:
            self._for_requests.release()
        return True

    def check(self, file: DataFile) -> None:
        """Raises: InvalidDataError, also where the limits do not suffice; ServiceUnavailableError when there
        can be no child now, or no more."""
        self._check(file, self._timeout_s, niceness=_BACKGROUND_NICENESS)

    def stop(self) -> None:
        """End what is being checked; it says nothing about the files."""
        self._stopping.set()

    def _check(self, file: DataFile, timeout_s: float, *, niceness: int) -> None:
        try:
            line, exit_code = self._ask_child(file, timeout_s, niceness)
        except OSError as error:
            raise ServiceUnavailableError(f"Training files cannot be checked now: {error}") from error
        if not line:
            raise InvalidDataError(
                f"{file.filename} could not be checked: the process that read it ended with "
                f"{describe_exit(exit_code)}, perhaps for want of memory (logs/{self._log_path.name} has its "
                "last words). Split the file, and look for rows that are very long or deeply nested."
            )
        if (found := Verdict.model_validate_json(line).error) is not None:
            raise from_body(found)

    def _ask_child(self, file: DataFile, timeout_s: float, niceness: int) -> tuple[bytes, int]:
        """(the child's line, empty where it said none, and its exit code)."""
        deadline = time.monotonic() + timeout_s
        limits = (str(self._memory_bytes), str(niceness))
        command = [sys.executable, "-m", "sage_orchestrator.jobs.check_child", *limits]
        lines: list[bytes] = []
        with Child(command, log_path=self._log_path) as child:
            child.order(file.model_dump_json().encode())
            while not lines and not child.has_ended():
                left_s = deadline - time.monotonic()
                if self._stopping.is_set():
                    raise ServiceUnavailableError("The orchestrator is being stopped: try again.")
                if left_s <= 0:
                    raise OutOfTimeError(
                        f"{file.filename} could not be checked within {timeout_s:,.0f} s: split it, or raise "
                        f"SAGE_CHECK_TIMEOUT_S. Where it is small, the chat template of {file.model} may "
                        "never end: choose another base model."
                    )
                # Libraries to which memory is refused may crash, or never return: the child's own limit is
                # higher, for what comes between two looks.
                if _data_bytes(child.pid) > self._memory_bytes:
                    raise out_of_memory(file.filename, self._memory_bytes)
                lines = child.receive(min(_LOOK_S, left_s))
            exit_code = child.reap()
            lines = lines or child.receive(0)
        return (lines[0] if lines else b""), exit_code


def _data_bytes(pid: int) -> int:
    """The memory of its own that a process has asked for, as RLIMIT_DATA counts; 0 where no system tells."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[5]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _is_harmless(file: DataFile) -> bool:
    """Whether no more can come of the file than its few bytes say, and no template of others is rendered."""
    from sage.tools.finetune.base_models import is_builtin
    from sage.tools.finetune.data.opening import is_plain
    from sage.tools.finetune.data.tokenizer_files import has_tokenizer

    if file.path.stat().st_size > _HARMLESS_BYTES or not is_plain(file.path):
        return False
    return is_builtin(file.model) or not has_tokenizer(file.model, file.home)
