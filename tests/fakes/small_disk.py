"""A disk that is full, without filling one."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_full: list[str] = []


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to write beyond: as good as a full disk, and it needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_room_below(folder: Path) -> Iterator[None]:
    """Python refuses to open any file there for writing, as on a disk of its own that is full."""
    _full.append(f"{folder.absolute()}{os.sep}")
    try:
        yield
    finally:
        _full.pop()


def _refuse_to_write(event: str, details: tuple[Any, ...]) -> None:
    if not _full or event != "open":
        return
    path, _, flags = details
    if isinstance(path, str) and path.startswith(tuple(_full)) and flags & (os.O_WRONLY | os.O_RDWR):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


sys.addaudithook(_refuse_to_write)  # for the length of the process: it cannot be taken back
