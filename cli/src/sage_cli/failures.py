"""Errors as people see them: one screen, what, where, what to do; and the exit codes."""

from __future__ import annotations

import errno
import json
import sys

from sage_contracts import errors

DONE, YOUR_INPUT, JOB_FAILED, UNREACHABLE, INTERRUPTED = 0, 2, 3, 4, 130

# The nearest class decides, so a new error of the tree has a code from the start.
_EXIT_CODES: dict[type[errors.SageError], int] = {
    errors.SageError: UNREACHABLE,
    errors.InvalidRequestError: YOUR_INPUT,
    errors.NotFoundError: YOUR_INPUT,
    errors.ConflictError: YOUR_INPUT,
    errors.AuthenticationError: YOUR_INPUT,
    errors.ForbiddenError: YOUR_INPUT,
    errors.PayloadTooLargeError: YOUR_INPUT,
    errors.StorageFullError: YOUR_INPUT,
    errors.TrainingFailedError: JOB_FAILED,
}

_ADVICE: dict[type[errors.SageError], str] = {
    errors.OutOfMemoryError: "Try --preset minimal, or --set max_length=512.",
    errors.DeviceBusyError: "`sage status` shows what holds the device. Try again when it is done.",
    errors.EngineStartingError: "Try again in a moment; `sage status` shows how far the engine is.",
    errors.EngineFailedError: "`sage status` shows the engine; its log is in the stack's logs folder.",
    errors.StorageFullError: "Free some space.",
}

# By who refused the key; "" is an error that does not say who raised it.
_KEY_ADVICE = {
    "": "Set SAGE_API_KEY to a key that the gateway knows.",
    "gateway": "Set SAGE_API_KEY to a key that the gateway knows.",
    "openai": "Set OPENAI_API_KEY where the stack is started: `sage down`, then `sage up`.",
    "vllm": "Set SAGE_VLLM_API_KEY where the stack is started: `sage down`, then `sage up`.",
}

# Of the API's requests: what a person at the command line said them with.
_OPTIONS = {
    "training_file": "--data",
    "sage.config": "--set or --config",
    "sage.name": "--name",
    "sage.preset": "--preset",
    "sage.task": "--task",
}


class StackError(errors.SageError):
    """The stack could not be started or stopped; the message says which part and why."""

    code = "stack_failed"


class EngineFault(Exception):  # noqa: N818  # not of the tree: as any other fault of ours
    """A program of the engine broke; the message says at what, and its last words."""


def exit_code_of(error: Exception) -> int:
    """The exit code of the nearest class in the table; 1 is a fault of this program."""
    if isinstance(error, ValueError) or _is_full_disk(error):
        return YOUR_INPUT
    if not isinstance(error, errors.SageError):
        return 1
    return next(_EXIT_CODES[cls] for cls in type(error).__mro__ if cls in _EXIT_CODES)


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def advice_of(error: errors.SageError) -> str | None:
    """What to do, where the message itself is not known to say it."""
    if isinstance(error, errors.AuthenticationError):
        return _KEY_ADVICE.get(error.source or "")
    return next((_ADVICE[cls] for cls in type(error).__mro__ if cls in _ADVICE), None)


def describe(error: Exception) -> list[str]:
    """The lines of the error screen, the message first."""
    if _is_full_disk(error):
        return [f"The disk is full: {error}.", _ADVICE[errors.StorageFullError]]
    if not isinstance(error, errors.SageError):
        if isinstance(error, ValueError | OSError) and str(error):
            return [str(error)]
        return [
            str(error) if isinstance(error, EngineFault) else f"{type(error).__name__}: {error}",
            "This is a fault of sage itself. SAGE_DEBUG=1 shows the traceback.",
        ]
    lines = [error.message]
    where = []
    if error.param and error.param not in error.message:
        where.append(f"in {_OPTIONS.get(error.param, error.param)}")
    if error.source and error.source not in error.message:
        where.append(f"said by {error.source}")
    if where:
        lines.append(f"Where: {', '.join(where)}.")
    if error.retry_after_s:
        lines.append(f"Try again in {error.retry_after_s:.0f} s.")
    elif (advice := advice_of(error)) and advice not in error.message:
        lines.append(advice)
    return lines


def show(error: Exception) -> None:
    """Print the error screen to standard error."""
    from rich.text import Text

    from sage_cli.render import error_console, without_controls

    console = error_console()
    first, *rest = map(without_controls, describe(error))  # a server may have said it
    console.print(Text.assemble(("Error: ", "bold red"), first), soft_wrap=not console.is_terminal)
    for line in rest:
        console.print(Text(line), soft_wrap=not console.is_terminal)
    sys.stderr.flush()


def print_json(value: object) -> None:
    """Print machine-readable output on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
