"""What the starting process and its ranks say to each other, pickled over a pipe of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage.tools.finetune.callbacks import StopMode, TrainingCallback
from sage_contracts.config import OomRung, TrainingConfig


@dataclass(frozen=True)
class RankSpec:
    """The first thing a rank hears: the run, as `LoRATrainer` was asked for it."""

    config: TrainingConfig
    rungs: tuple[OomRung, ...]
    home: Path
    training_path: Path | None
    validation_path: Path | None
    resume: bool
    run_id: str | None
    is_cpu: bool
    is_sharded: bool
    """As it was chosen; the config may leave it open."""


@dataclass(frozen=True)
class Wish:
    """To rank 0: what the callbacks want."""

    stop: StopMode


@dataclass(frozen=True)
class Told:
    """From rank 0: one call of a callback."""

    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True)
class Cleared:
    """From rank 0: no checkpoints of an earlier run are left."""


@dataclass(frozen=True)
class Failed:
    """From any rank: why it ends. `code` is a SageError's; None for what nobody expected."""

    code: str | None
    message: str
    param: str | None = None


class Forwarder:
    """A TrainingCallback by its methods: every call becomes a `Told`."""

    def __init__(self, send: Any) -> None:
        self.send = send
        self.wish: StopMode | None = None

    def should_stop(self) -> StopMode | None:
        return self.wish

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(TrainingCallback, name):
            raise AttributeError(name)
        return lambda *arguments, **named: self.send(Told(name, arguments, named))
