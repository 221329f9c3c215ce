"""Messages between the orchestrator and its workers (`/internal/…`), and the names of the doorbells."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sage_contracts.config import TrainingConfig
from sage_contracts.jobs import EventLevel, EventType, JobMetrics
from sage_contracts.models import ExportContent, ExportFormat, WeightsDtype

TRAIN_TASK = "sage.train"
TRAIN_QUEUE = "train"
MERGE_TASK = "sage.merge"
MERGE_QUEUE = "merge"

INTERNAL_TOKEN_HEADER = "X-Sage-Internal-Token"


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Order(StrEnum):
    """What the orchestrator wants of a running attempt; rides on every reply to its reports."""

    CONTINUE = "continue"
    CANCEL = "cancel"
    PAUSE = "pause"


class ClaimRequest(_Wire):
    worker_id: str
    device: str = "cpu"
    """`cpu`, `cuda:0`, …: the device the worker would train on."""
    device_total_bytes: int = 0
    claim_id: str | None = None
    """The same when it is asked again since no reply came: whoever has got it then gets it again."""


class TrainClaim(_Wire):
    """The answer to a successful claim: all that the attempt needs. Paths are relative to SAGE_HOME."""

    job_id: str
    attempt: int
    """The fencing token: reports with an older one are refused."""
    lease_s: float
    """Report more often than this or lose the job."""
    name: str
    version: int
    config: TrainingConfig
    training_path: str | None = None
    """None: the task's own data."""
    training_filename: str | None = None
    """As whoever uploaded it calls it, for what people read."""
    validation_path: str | None = None
    validation_filename: str | None = None
    output_dir: str
    """`finetune_output/<name>`."""
    named_version: int | None = None
    """What the bare name means so far. None: nothing yet."""
    told_step: int | None = None
    """The last step whose figures came from an earlier attempt, 0 for none. None: not known."""
    unfinished_jobs: list[str] | None = None
    """Other jobs that have begun and not ended: what they left in the folder to go on from is kept. None: not
    known."""


class EventReport(_Wire):
    """One line of a job's history, as the worker saw it."""

    created_at: float
    level: EventLevel = EventLevel.INFO
    message: str
    type: EventType = "message"
    data: dict[str, Any] | None = None
    seq: int | None = None
    """Counts up within an attempt, from 1. A report is sent again when its answer was lost: what comes under
    a number that is known already is dropped. None is always taken."""


class CheckpointReport(_Wire):
    step: int
    path: str
    train_loss: float | None = None
    eval_loss: float | None = None


class Report(_Wire):
    """POST /internal/jobs/{id}/events: news, and the renewal of the lease."""

    worker_id: str
    attempt: int
    events: list[EventReport] = Field(default_factory=list)
    checkpoints: list[CheckpointReport] = Field(default_factory=list)
    metrics: JobMetrics | None = None


class ReportReply(_Wire):
    order: Order = Order.CONTINUE
    lease_s: float


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    """It cannot go on where it is, and could once somebody has helped: paused, with the reason."""
    RELEASED = "released"
    """The worker is going away; the job returns to the queue and resumes elsewhere."""


class Finish(_Wire):
    """POST /internal/jobs/{id}/finish."""

    worker_id: str
    attempt: int
    outcome: Outcome
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    metrics: JobMetrics | None = None
    base_model: str | None = None
    """What the adapter stands on: a path relative to SAGE_HOME, an absolute folder, or a Hub id.

    Of a model tuned in full, its own immutable copy: it is served without an adapter.
    """
    adapter_path: str | None = None
    """The immutable copy, relative to SAGE_HOME."""
    meta: dict[str, Any] = Field(default_factory=dict)


class MergeClaim(_Wire):
    merge_id: str
    attempt: int
    lease_s: float
    name: str
    version: int
    base_model: str
    adapter_path: str
    """Empty for a model tuned in full: `base_model` is its own folder."""
    output_dir: str
    """Relative to SAGE_HOME: the version's folder, where merged_model/ goes."""
    link_path: str | None = None
    """Relative to SAGE_HOME: a link to it that users look for; only the newest version gets one."""
    dtype: WeightsDtype = "auto"
    format: ExportFormat = "safetensors"
    content: ExportContent = "merged"
    repo: str | None = None
    allow_public: bool = False


class MergeReport(_Wire):
    """POST /internal/merges/{id}/events."""

    worker_id: str
    attempt: int
    phase: str


class MergeFinish(_Wire):
    worker_id: str
    attempt: int
    outcome: Literal["succeeded", "failed", "released"]
    error_code: str | None = None
    error_message: str | None = None
    merged_path: str | None = None
    """What was written, in whichever format; relative to SAGE_HOME."""
    meta: dict[str, Any] = Field(default_factory=dict)


class WorkerBeat(_Wire):
    """POST /internal/workers/beat: a worker is alive, with or without a job."""

    worker_id: str
    kind: Literal["trainer", "merger", "inference"]
    device: str = "cpu"
    device_total_bytes: int = 0
    device_free_bytes: int | None = None
    detail: dict[str, Any] = Field(default_factory=dict)
    is_leaving: bool = False
    """The last beat of a worker that was told to stop."""


class WorkerSeen(WorkerBeat):
    """One of GET /internal/workers: the last beat, and when it came."""

    last_seen: float
    is_up: bool
