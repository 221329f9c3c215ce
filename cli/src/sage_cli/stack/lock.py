"""One `sage up` or `sage down` at a time per home."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sage_contracts.errors import ConflictError, InvalidRequestError


@contextmanager
def stack_lock(path: Path, *, timeout_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock; the kernel drops it when this process dies.

    Raises: ConflictError after `timeout_s`; InvalidRequestError where the lock cannot be written.
    """
    descriptor = _open(path)
    try:
        _acquire(descriptor, path, timeout_s, say)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InvalidRequestError(
            f"{path} cannot be written: {error.strerror}. Nothing is started or stopped without this lock:"
            " make its folder writable, or run this as the user who started the stack."
        ) from error


def _acquire(descriptor: int, path: Path, timeout_s: float, say: Callable[[str], None]) -> None:
    deadline = time.monotonic() + timeout_s
    has_told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"Another `sage up` or `sage down` has been busy for {timeout_s:.0f} s ({path})."
                    " Wait for it, or end it."
                ) from None
            if not has_told:
                say("Waiting for another `sage` command that starts or stops the stack")
                has_told = True
            time.sleep(0.1)
        else:
            return
