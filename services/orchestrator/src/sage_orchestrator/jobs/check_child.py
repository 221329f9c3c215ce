"""`python -m sage_orchestrator.jobs.check_child MEMORY_BYTES NICENESS`: checks the file that it is told of on
standard input, and says in one line what it found."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from sage_contracts.errors import SageError
from sage_contracts.lifeline import die_first
from sage_orchestrator.jobs.checking import DataFile, Verdict, out_of_memory
from sage_servicekit.children import end_with_parent, take_stdout

_PR_SET_PDEATHSIG = 1
_MAX_MESSAGE_CHARS = 8_000
"""A field's name may be as long as its row."""


def verdict(file: DataFile, memory_bytes: int) -> Verdict:
    """What is wrong with the file, if anything is."""
    try:
        file.check()
        return Verdict()
    except SageError as error:
        found = error
    except MemoryError:
        found = out_of_memory(file.filename, memory_bytes)
    body = found.to_body("orchestrator")
    body.error.message = body.error.message[:_MAX_MESSAGE_CHARS]
    return Verdict(error=body)


def _limit_memory(size_bytes: int) -> None:
    # Not of the address space, of which allocators and mapped libraries take far more than they use.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = size_bytes if most == resource.RLIM_INFINITY else min(size_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _die_with_parent() -> None:
    """Also while a library that does not return keeps the thread of `end_with_parent` from running.

    The signal comes when the thread ends that spawned this process: until then it waits for it.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    orders = end_with_parent()
    out = take_stdout()
    memory_bytes, niceness = map(int, sys.argv[1:])
    _limit_memory(memory_bytes * 5 // 4)
    os.nice(niceness)
    die_first()
    _die_with_parent()
    file = DataFile.model_validate_json(orders.get())
    out.write(verdict(file, memory_bytes).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
