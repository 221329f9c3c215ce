"""Asks a program of the engine, in a process of its own: what it imports is heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence

from pydantic import ValidationError
from rich.console import Console

from sage_cli.failures import EngineFault
from sage_contracts.errors import ErrorBody, ServiceUnavailableError, from_body

_TIMEOUT_S = 1800.0
"""The built-in base model is fetched and converted at first use."""
_TAIL_LINES = 5


def ask(module: str, arguments: Sequence[str], console: Console, *, doing: str) -> bytes:
    """The program's document; meanwhile it is said what it is `doing` ("Rendering"), and what it says itself.

    Raises: the program's SageError; ServiceUnavailableError when it takes too long or lacks a package;
    EngineFault.
    """
    process = subprocess.Popen(
        # -P: what lies in the user's folder is no part of the program.
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = threading.Timer(_TIMEOUT_S, process.kill)
    deadline.start()
    # Both pipes are read at once, so that the program waits for neither.
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: written.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        tail = _follow(process, console, doing)
        status = process.wait()
    finally:
        is_late = not deadline.is_alive()
        deadline.cancel()
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if is_late:
        raise ServiceUnavailableError(f"{doing} took longer than {_TIMEOUT_S:.0f} s and was stopped.")
    document = b"".join(written)
    if status != 0:
        raise _failure(document, tail, doing)
    return document


def _follow(process: subprocess.Popen[bytes], console: Console, doing: str) -> list[str]:
    """Show what the process says while it works; the last lines are kept."""
    assert process.stderr is not None
    is_debugging = os.environ.get("SAGE_DEBUG", "") not in ("", "0")
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with console.status(doing):
        for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            tail.append(text)
            is_news = console.is_terminal and not text.startswith((" ", "Traceback"))
            if is_debugging or is_news:
                console.print(text, style="dim", markup=False)
    return list(tail)


def _failure(document: bytes, tail: list[str], doing: str) -> Exception:
    try:
        error = from_body(ErrorBody.model_validate_json(document))
        error.source = None  # the process is this command's own business
        return error
    except ValidationError:
        last = tail[-1] if tail else "it said nothing"
    if "No module named" in last:
        return ServiceUnavailableError(
            f"{doing} needs the training packages, which this Python lacks ({last}). "
            "Install them: `make install` in the source tree."
        )
    return EngineFault(f"{doing} failed: {last}")
