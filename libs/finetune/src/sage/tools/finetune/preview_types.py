"""What is asked of a preview, and what it says. No torch, no transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sage.tools.finetune.data import BadRow
from sage_contracts.config import Method, Task

PieceKind = Literal["context", "special", "learned", "turn_end"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PreviewRequest(_Message):
    home: Path
    data: Path | None = None
    """A file of rows, or for the task `code` a source tree; None takes the task's own data."""
    task: Task = Task.CUSTOM
    method: Method | None = None
    """What a run would learn by; None takes every row as what it looks like."""
    model: str = "auto"
    rows: int = 3
    max_length: int | None = None
    """Tokens; None takes the default of this machine."""


class Piece(_Message):
    """Neighbouring tokens of one kind."""

    kind: PieceKind
    is_cut: bool
    """Beyond max_length: the model never sees it."""
    tokens: list[str]


class PreviewSample(_Message):
    """One row of training."""

    origin: str
    answer: str = ""
    """Of preference data: `chosen`, `rejected`, `wanted` or `unwanted`."""
    pieces: list[Piece]
    tokens: int
    learned: int
    """Tokens that carry loss, those that are cut left out."""
    cut: int
    """Tokens beyond max_length."""


class Preview(_Message):
    model: str
    source: str
    max_length: int
    samples: list[PreviewSample] = Field(default_factory=list)
    unusable: list[BadRow] = Field(default_factory=list)
    """Rows passed over on the way to the samples."""
