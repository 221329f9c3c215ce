"""What the training child says on its standard output: one JSON object a line, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sage_contracts.config import OomRung
from sage_contracts.jobs import EventLevel, JobMetrics
from sage_contracts.workers import TrainClaim


class ChildSpec(BaseModel):
    """The file that the child is started with."""

    model_config = ConfigDict(extra="forbid")

    home: str
    device: str
    claim: TrainClaim
    rungs: list[OomRung] = Field(default_factory=list)
    """Of the out-of-memory ladder, chosen after an earlier child of this attempt had died."""


class ChildOrder(BaseModel):
    """What a child that waits (`--wait`) is told on its standard input, one line of JSON."""

    model_config = ConfigDict(extra="forbid")

    spec: Path
    log: Path


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ReadyMessage(_Said):
    """A waiting child has imported what training needs."""

    kind: Literal["ready"] = "ready"


class PhaseMessage(_Said):
    kind: Literal["phase"] = "phase"
    name: str
    detail: str = ""


class StepMessage(_Said):
    kind: Literal["step"] = "step"
    step: int
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    train_token_accuracy: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    trained_tokens: int | None = None
    peak_memory_bytes: int | None = None
    is_repeated: bool = False
    """An earlier attempt took it, and logged it."""


class EvalMessage(_Said):
    """The held-out rows were measured."""

    kind: Literal["eval"] = "eval"
    of: Literal["base", "step", "tuned"]
    step: int = 0
    loss: float | None
    """None where it is no number, which JSON cannot say."""
    perplexity: float | None = None
    token_accuracy: float | None = None
    text: str = ""
    """All of it, for people."""


class AnswerMessage(_Said):
    """What the model answers to one of the run's `sample_prompts`."""

    kind: Literal["answer"] = "answer"
    step: int
    prompt: str
    answer: str


class CheckpointMessage(_Said):
    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    """Relative to SAGE_HOME."""
    train_loss: float | None = None
    eval_loss: float | None = None
    is_repeated: bool = False
    """An earlier attempt wrote it, whose worker may have died before it could tell of it."""


class LogMessage(_Said):
    kind: Literal["log"] = "log"
    level: EventLevel = EventLevel.INFO
    message: str


class DoneMessage(_Said):
    """The version is written; the last thing a successful child says."""

    kind: Literal["done"] = "done"
    metrics: JobMetrics
    base_model: str
    """What serving loads first: the base, or the tuned model itself where all of it was tuned."""
    adapter_path: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


class StoppedMessage(_Said):
    """It was told to stop and did; what can be resumed is on disk."""

    kind: Literal["stopped"] = "stopped"
    step: int | None = None
    """The step of the checkpoint it saved."""


class RestartMessage(_Said):
    """Memory did not suffice, and a rung of the ladder was taken: the next child goes on from there."""

    kind: Literal["restart"] = "restart"


class FailedMessage(_Said):
    kind: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None
    is_explained: bool = False
    """The message stands alone; otherwise the log's tail is put beside it."""
    may_pass: bool = False
    """The fault is the machine's or a service's, not the job's."""


ChildMessage = Annotated[
    ReadyMessage
    | PhaseMessage
    | StepMessage
    | EvalMessage
    | AnswerMessage
    | CheckpointMessage
    | LogMessage
    | DoneMessage
    | StoppedMessage
    | RestartMessage
    | FailedMessage,
    Field(discriminator="kind"),
]

CHILD_MESSAGE: TypeAdapter[ChildMessage] = TypeAdapter(ChildMessage)
