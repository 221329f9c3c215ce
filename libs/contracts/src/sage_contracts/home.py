"""The layout of SAGE_HOME, and how files are written into it. Standard library only."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Where things lie under SAGE_HOME. Building one creates nothing."""

    root: Path

    @classmethod
    def from_env(cls) -> Home:
        """SAGE_HOME, or ~/.sage."""
        return cls(Path(os.environ.get("SAGE_HOME") or "~/.sage").expanduser().absolute())

    @property
    def files(self) -> Path:
        """Uploaded files, named by id."""
        return self.root / "files"

    @property
    def file_parts(self) -> Path:
        """Parts of files whose upload is not completed."""
        return self.files / "parts"

    @property
    def base_models(self) -> Path:
        return self.root / "base_models"

    @property
    def finetune_output(self) -> Path:
        """One folder per tuned model, as users list it."""
        return self.root / "finetune_output"

    @property
    def state(self) -> Path:
        """The database and, embedded, the queue folders."""
        return self.root / "state"

    @property
    def run(self) -> Path:
        """Process ids, sockets, heartbeats: nothing that outlives the processes."""
        return Path(os.environ["SAGE_RUN_DIR"]) if os.environ.get("SAGE_RUN_DIR") else self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def indexes(self) -> Path:
        return self.root / "indexes"

    def resolve(self, stored: str) -> Path:
        """A stored path (relative to the home, or absolute) as an absolute one."""
        path = Path(stored)
        # `~somebody` who is not known here stays the name of a folder that is not there.
        with suppress(RuntimeError):
            path = path.expanduser()
        return path if path.is_absolute() else self.root / path

    def relative(self, path: Path) -> str:
        """How a path is stored: relative to the home where it lies inside, so that homes can move."""
        absolute = path.expanduser().absolute()
        return str(absolute.relative_to(self.root)) if absolute.is_relative_to(self.root) else str(absolute)


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """A free name beside `path`: the file or link made there takes its place when the block ends well.

    Whoever looks sees the old or the new, never a part, and never nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Have what is in a file, or which names are in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Write a file whole and on the disk, readable as `mode` says from its first byte on."""
    data = content.encode() if isinstance(content, str) else content
    with replaced_whole(path) as unfinished:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, mode)
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
