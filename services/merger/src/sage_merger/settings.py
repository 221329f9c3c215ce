"""Settings of the merger; the environment spells them SAGE_<NAME>."""

from __future__ import annotations

import sys

from pydantic import Field

from sage_servicekit.settings import WorkerSettings


def _own_child() -> list[str]:
    return [sys.executable, "-m", "sage_merger.child"]


class MergerSettings(WorkerSettings):
    merge_child_command: list[str] = Field(default_factory=_own_child)
    """The program that merges; it gets the path of its spec as last argument. JSON in the environment."""
    merge_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the child; None takes what the container may use."""
    merge_stop_grace_s: float = Field(default=5.0, ge=0)
    """From SIGTERM to SIGKILL. A merge has nothing to save: what is unfinished vanishes and is done again."""
