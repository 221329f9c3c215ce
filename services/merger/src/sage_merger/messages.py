"""What the merging child says on its standard output: one JSON object a line, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sage_contracts.workers import MergeClaim


class ChildSpec(BaseModel):
    """The file that the child is started with."""

    model_config = ConfigDict(extra="forbid")

    home: str
    claim: MergeClaim


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PhaseMessage(_Said):
    kind: Literal["phase"] = "phase"
    text: str


class DoneMessage(_Said):
    kind: Literal["done"] = "done"
    merged_path: str
    """What was written, relative to SAGE_HOME."""
    meta: dict[str, Any] = Field(default_factory=dict)


class FailedMessage(_Said):
    kind: Literal["failed"] = "failed"
    code: str
    message: str
    is_explained: bool = False
    """The message stands alone; otherwise the log's tail is put beside it."""


ChildMessage = Annotated[PhaseMessage | DoneMessage | FailedMessage, Field(discriminator="kind")]

CHILD_MESSAGE: TypeAdapter[ChildMessage] = TypeAdapter(ChildMessage)
