"""Fine-tuning jobs. Source: OpenAI API reference, "Fine-tuning"; the `sage` object is our one extension."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sage_contracts.bounds import Tags, Words
from sage_contracts.config import Method, OomRung, PresetName, Task, TrainingConfig

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# A tuned model of such a name could be asked for by its version only.
_TAKEN_NAMES = {
    "mock": "chat requests for it go to the backend that needs no model",
    "default": "chat requests for it go to the gateway's default model",
}


def name_fault(name: str) -> str | None:
    """Why this cannot be a model's name; None when it can."""
    if name in _TAKEN_NAMES:
        return f"{name!r} cannot be a model's name, because {_TAKEN_NAMES[name]}: choose another one."
    if re.fullmatch(_NAME, name):
        return None
    shown = name if len(name) <= 100 else f"{name[:99]}…"
    return (
        f"{shown!r} cannot be a model's name: use up to 64 Latin letters (a-z, A-Z), digits, dots, dashes "
        "and underscores, beginning with a letter or a digit."
    )


def _require_name(name: str) -> str:
    if fault := name_fault(name):
        raise PydanticCustomError("model_name", "{fault}", {"fault": fault})
    return name


ModelName = Annotated[str, AfterValidator(_require_name), Field(json_schema_extra={"pattern": f"^{_NAME}$"})]
"""A name users give to a tuned model: also a folder name, so no separators and no leading dot."""

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""What every random generator takes: the preference methods seed numpy too, which takes no other."""


class JobStatus(StrEnum):
    """OpenAI's names. The terminal ones are final: nothing leaves them."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not _NEXT[self]

    def can_become(self, target: JobStatus) -> bool:
        return target in _NEXT[self]


_NEXT: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        # QUEUED again when the worker is lost; the next attempt resumes from the last checkpoint.
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class Hyperparameters(BaseModel):
    """OpenAI's three; "auto" leaves one to the preset."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"


class SupervisedMethod(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class PreferenceHyperparameters(Hyperparameters):
    beta: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"


class PreferenceMethod(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hyperparameters: PreferenceHyperparameters = Field(default_factory=PreferenceHyperparameters)


class JobMethod(BaseModel):
    """OpenAI's `supervised` and `dpo`, and in the same shape `orpo` and `kto`."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["supervised", "dpo", "orpo", "kto"] = "supervised"
    supervised: SupervisedMethod | None = None
    dpo: PreferenceMethod | None = None
    orpo: PreferenceMethod | None = None
    kto: PreferenceMethod | None = None

    @model_validator(mode="after")
    def _settings_of_its_type(self) -> Self:
        for name in ("supervised", "dpo", "orpo", "kto"):
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"has settings for {name!r}, but its type is {self.type!r}")
        return self

    @property
    def learning(self) -> Method:
        """The same as TrainingConfig calls it."""
        return "sft" if self.type == "supervised" else self.type

    @property
    def hyperparameters(self) -> Hyperparameters | None:
        """Those given with its type."""
        given: SupervisedMethod | PreferenceMethod | None = getattr(self, self.type)
        return given.hyperparameters if given else None


class SageJobOptions(BaseModel):
    """What a request may say in its `sage` object. Sparse: unset fields come from the preset."""

    model_config = ConfigDict(extra="forbid")

    name: ModelName | None = None
    task: Task | None = None
    preset: PresetName | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    """Sparse TrainingConfig fields; they win over the preset and over `hyperparameters`."""


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""OpenAI's bounds: https://platform.openai.com/docs/api-reference/fine-tuning/create."""


class WandbSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    project: Words
    name: Words | None = None
    entity: Words | None = None
    tags: Tags | None = None


class Integration(BaseModel):
    """Where a job's figures go besides: OpenAI's shape, of which Weights & Biases is the only kind."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["wandb"]
    wandb: WandbSettings


class CreateJobRequest(BaseModel):
    """POST /v1/fine_tuning/jobs. `training_file` may be left out for tasks that ship their own data."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=4096)]
    """A Hub id, a folder that the trainer can see, a built-in name such as `smollm2-135m`, or "auto"."""
    training_file: Words | None = None
    validation_file: Words | None = None
    suffix: ModelName | None = None
    seed: Seed | None = None
    hyperparameters: Hyperparameters | None = None
    method: JobMethod | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=8)] | None = None
    sage: SageJobOptions = Field(default_factory=SageJobOptions)


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class JobMetrics(BaseModel):
    """Where the run stands, for bars and tables; every field is absent until it is known."""

    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    train_token_accuracy: float | None = None
    """Share of the last step's label tokens that were the model's first choice."""
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    base_eval_loss: float | None = None
    """Held-out loss before training."""
    eval_loss: float | None = None
    """Held-out loss after training; while it runs, of the newest evaluation."""
    base_perplexity: float | None = None
    """exp of the held-out loss, before training."""
    perplexity: float | None = None
    base_token_accuracy: float | None = None
    """Share of held-out label tokens that the base would have chosen itself."""
    token_accuracy: float | None = None
    base_reward_accuracy: float | None = None
    """Preference methods: share of held-out comparisons that the base ranks right, ties half."""
    reward_accuracy: float | None = None
    """The same after training."""
    base_reward_margin: float | None = None
    reward_margin: float | None = None
    """Mean reward of the better answers above that of the worse ones."""
    trained_tokens: int | None = None
    peak_memory_bytes: int | None = None
    oom_rungs: list[OomRung] | None = None
    """What was changed for lack of memory, in order; known at the end."""


class SageJobInfo(BaseModel):
    """The extension object on a job: how it was resolved and where it stands."""

    name: str
    task: Task
    preset: PresetName | None = None
    config: TrainingConfig
    unreadable: str | None = None
    """Which of its stored settings means nothing here, and is left out of `config`."""
    attempt: int = 0
    version: int | None = None
    output_dir: str | None = None
    """Relative to SAGE_HOME."""
    metrics: JobMetrics = Field(default_factory=JobMetrics)
    worker_id: str | None = None


class FineTuningJob(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    model: str
    fine_tuned_model: str | None = None
    organization_id: str = "sage"
    status: JobStatus
    training_file: str
    validation_file: str | None = None
    result_files: list[str] = Field(default_factory=list)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    method: JobMethod = Field(default_factory=JobMethod)
    trained_tokens: int | None = None
    error: JobError | None = None
    seed: int = 42
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    sage: SageJobInfo


class EventLevel(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


EventType = Literal["message", "metrics"]


class JobEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: EventLevel = EventLevel.INFO
    message: str
    type: EventType = "message"
    data: dict[str, Any] | None = None


class CheckpointMetrics(BaseModel):
    step: int | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointInfo(BaseModel):
    is_servable: bool = False
    """Its job has succeeded, and an adapter lies where it was written: its name answers like a model's."""


class JobCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics
    sage: CheckpointInfo = Field(default_factory=CheckpointInfo)
