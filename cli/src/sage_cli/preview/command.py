"""Asks the engine for a preview, in a process of its own: what it imports is heavy."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from tempfile import TemporaryFile

from pydantic import ValidationError
from rich.console import Console

from sage.tools.finetune.preview_types import Preview, PreviewRequest
from sage_cli import failures, locate, render
from sage_cli.jobs.wish import JobWish
from sage_cli.preview.view import show
from sage_contracts.config import Task
from sage_contracts.errors import (
    ErrorBody,
    InvalidRequestError,
    SageError,
    ServiceUnavailableError,
    from_body,
)

_TIMEOUT_S = 1800.0
"""The built-in base model is fetched and converted at first use."""
_TAIL_LINES = 5


def preview_command(
    wish: JobWish, *, rows: int, max_length: int | None, with_tokens: bool, as_json: bool
) -> None:
    wish, settings = wish.with_settings(is_trained=False)
    task, method = Task(wish.task or Task.CUSTOM), settings.get("method")
    if wish.data is None and task == Task.CUSTOM and method in (None, "sft"):
        raise InvalidRequestError(
            "Give a FILE to preview, or with --task code, qa, chat or instruction the data such a task has; "
            "--method dpo, orpo and kto bring a sample set too."
        )
    request = PreviewRequest(
        home=locate.home_root(),
        data=wish.data,
        task=task,
        method=method,
        model=wish.model,
        rows=rows,
        max_length=max_length or settings.get("max_length"),
    )
    found = run(request, render.error_console())
    if as_json:
        failures.print_json(found.model_dump(mode="json"))
    else:
        show(found, render.output(), with_tokens=with_tokens)


def run(request: PreviewRequest, console: Console) -> Preview:
    """Raises: the engine's SageError; ServiceUnavailableError when it takes too long."""
    with TemporaryFile() as document:
        process = subprocess.Popen(
            # -P: what lies in the user's folder is no part of the program.
            [sys.executable, "-P", "-m", "sage.tools.finetune.preview", request.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=document,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        deadline = threading.Timer(_TIMEOUT_S, process.kill)
        deadline.start()
        try:
            tail = _follow(process, console)
            status = process.wait()
        finally:
            is_late = not deadline.is_alive()
            deadline.cancel()
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()
        document.seek(0)
        answer = document.read()
    if is_late:
        raise ServiceUnavailableError(f"Rendering took longer than {_TIMEOUT_S:.0f} s and was stopped.")
    if status == 0:
        return Preview.model_validate_json(answer)
    raise _failure(answer, tail)


def _follow(process: subprocess.Popen[str], console: Console) -> list[str]:
    """Show what the process says while it works; the last lines are kept."""
    assert process.stderr is not None
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with console.status("Rendering"):
        for line in process.stderr:
            tail.append(line.rstrip())
            if console.is_terminal and not line.startswith((" ", "Traceback")):
                console.print(line.rstrip(), style="dim", markup=False)
    return list(tail)


def _failure(answer: bytes, tail: list[str]) -> SageError:
    try:
        error = from_body(ErrorBody.model_validate_json(answer))
        error.source = None  # the process is this command's own business
        return error
    except ValidationError:
        last = tail[-1] if tail else "it said nothing"
    if "No module named" in last:
        return ServiceUnavailableError(
            f"Rendering needs the training packages, which this Python lacks ({last}). "
            "Install them: `make install` in the source tree."
        )
    return SageError(f"The preview failed: {last}")
