"""Settings of the trainer; the environment spells them SAGE_<NAME>."""

from __future__ import annotations

import sys

from pydantic import Field

from sage_servicekit.settings import WorkerSettings


def _own_child() -> list[str]:
    return [sys.executable, "-m", "sage_trainer.child"]


class TrainerSettings(WorkerSettings):
    train_child_command: list[str] = Field(default_factory=_own_child)
    """The program that trains; it gets the path of its spec as last argument. JSON in the environment."""
    warm_worker: bool = True
    """Whether an idle trainer keeps a process with its libraries imported, so that jobs start sooner."""
    train_device: str = "auto"
    """`auto`, `cpu`, or a GPU: its number as nvidia-smi counts (`cuda:1`), or its UUID."""
    train_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the child; None takes what the container may use."""
    stop_grace_s: float = Field(default=30.0, ge=0)
    """From SIGTERM to SIGKILL: time to save a checkpoint. The stop grace of a container must be longer."""
    spool_events: int = Field(default=2000, ge=10)
    """Events kept while the orchestrator is silent; metrics go first when there are more."""

    @property
    def waiting_child_command(self) -> list[str] | None:
        """How a child is started ahead of its job; None when none is wanted, or it is not our own program."""
        is_own = self.train_child_command == _own_child()
        return [*self.train_child_command, "--wait"] if self.warm_worker and is_own else None
