"""Files and folders that appear whole or not at all, and one process at a time where it matters."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir, mkdtemp
from typing import Any

from sage_contracts.errors import SageError, ServiceUnavailableError, StorageFullError
from sage_contracts.home import sync_path, write_whole

_LOCK_POLL_S = 0.2
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    Readers of an older `target` keep the files they opened. Raises: StorageFullError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with storage_errors(target):
            yield unfinished
            unfinished.chmod(0o755)  # mkdtemp makes it private; other services read it
            for path in unfinished.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
                if path.is_file():
                    sync_path(path)
            _replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    """Where an older `target` was, it is gone, or lies where `new` was."""
    old = target.with_name(f".{target.name}.old.{os.getpid()}")
    if not _are_swapped(new, target):
        # A folder cannot be renamed onto one with something in it: the old one goes aside first.
        if target.exists():
            target.rename(old)
        new.rename(target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _are_swapped(one: Path, other: Path) -> bool:
    """Let two paths change places in one go; False, with nothing done, where the system cannot.

    See renameat2(2): Python has no function for it.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return bool(rename(*paths, _RENAME_EXCHANGE) == 0)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole. Raises: StorageFullError."""
    with storage_errors(path):
        write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def storage_errors(where: Path, setting: str = "") -> Iterator[None]:
    """Turn a full disk into StorageFullError. `setting`: the variable that says where such things lie."""
    try:
        yield
    except SageError:  # it has been put into words
        raise
    except Exception as error:
        if _is_full(error):
            elsewhere = f", or set {setting} to another disk" if setting else ""
            raise StorageFullError(
                f"The disk is full: {where} could not be written. Free some space{elsewhere}."
            ) from error
        raise


@contextmanager
def temporary_folder_errors() -> Iterator[None]:
    """The same for the temporary folder; what the block itself says of a full disk is left."""
    try:
        folder = gettempdir()
    except FileNotFoundError as error:  # a full disk looks like this too: it is tried with a few bytes
        raise StorageFullError(
            f"{error.strerror}: free some space, or set TMPDIR to another disk."
        ) from error
    with storage_errors(Path(folder), "TMPDIR"):
        yield


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder for temporary files, for the length of a block. Raises: StorageFullError."""
    with temporary_folder_errors(), TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries written in Rust or C++ pass on only the text.
    return "No space left on device" in str(error)


def file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_free_space(folder: Path, needed_bytes: int, what: str, setting: str = "SAGE_HOME") -> None:
    """`setting`: the variable that says where such things lie. Raises: StorageFullError."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageFullError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free. "
            f"Free some space, or set {setting} to another disk."
        )


@contextmanager
def exclusive_lock(path: Path, deadline_s: float, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a file lock, which the system drops should this process die. Raises: ServiceUnavailableError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    give_up_at = time.monotonic() + deadline_s
    with path.open("w") as handle:
        told = False
        while not _try_lock(handle.fileno()):
            if not told:
                report(f"Waiting for another process that prepares {path.stem}")
                told = True
            if time.monotonic() > give_up_at:
                raise ServiceUnavailableError(
                    f"Another process has held {path} for {deadline_s:.0f} s. Stop it and try again."
                )
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
