"""What a program of the engine prints: one document, its answer or why there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from pydantic import BaseModel

from sage.tools.finetune.storage import temporary_folder_errors
from sage_contracts.errors import SageError


def answer(make: Callable[[], BaseModel], source: str) -> int:
    """Print what `make` makes, or an ErrorBody of what it raises, as JSON in UTF-8; returns the exit code.

    Anything but a SageError is a fault of the program, and is raised.
    """
    document: BaseModel
    with redirect_stdout(sys.stderr):  # libraries print; standard output is the document's
        try:
            with temporary_folder_errors():
                document, status = make(), 0
        except SageError as error:
            document, status = error.to_body(source), 1
    # In UTF-8 whatever the locale: the reader is a program.
    sys.stdout.buffer.write(document.model_dump_json().encode() + b"\n")
    sys.stdout.buffer.flush()
    return status
