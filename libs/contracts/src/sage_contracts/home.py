"""The layout of SAGE_HOME, and how files are written into it. Standard library only."""

from __future__ import annotations

import os
import tempfile
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
        path = Path(stored).expanduser()
        return path if path.is_absolute() else self.root / path

    def relative(self, path: Path) -> str:
        """How a path is stored: relative to the home where it lies inside, so that homes can move."""
        absolute = path.expanduser().absolute()
        return str(absolute.relative_to(self.root)) if absolute.is_relative_to(self.root) else str(absolute)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole: temporary name, fsync, rename. A reader sees the old or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
