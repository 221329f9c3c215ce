"""`python -m sage_orchestrator.jobs.check_child MEMORY_BYTES NICENESS`: checks the file that it is told of on
standard input, and says in one line what it found."""

from __future__ import annotations

import os
import resource
import sys

from sage.tools.finetune.lifeline import die_first
from sage_contracts.errors import InvalidDataError, SageError
from sage_orchestrator.jobs.checking import DataFile, Verdict
from sage_servicekit.children import end_with_parent, take_stdout

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
        found = InvalidDataError(
            f"{file.filename} could not be checked within {memory_bytes >> 20:,} MiB of memory: split it, "
            "shorten its longest rows, or raise SAGE_CHECK_MEMORY_BYTES."
        )
    body = found.to_body("orchestrator")
    body.error.message = body.error.message[:_MAX_MESSAGE_CHARS]
    return Verdict(error=body)


def main() -> None:
    orders = end_with_parent()
    out = take_stdout()
    memory_bytes, niceness = map(int, sys.argv[1:])
    # Not the address space, of which allocators and mapped libraries take far more than they use.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    os.nice(niceness)
    die_first()
    file = DataFile.model_validate_json(orders.get())
    out.write(verdict(file, memory_bytes).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
