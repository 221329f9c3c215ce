"""What a plan is asked for, and what it says."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sage.tools.finetune.token_counts import TokenCounts
from sage.tools.finetune.trial_step import Trial
from sage_contracts.config import PresetName, Task, TrainingConfig


class PlanSpec(BaseModel):
    """What a person asked for, as the command line has it; the config is resolved where the device is."""

    model_config = ConfigDict(extra="forbid")

    home: str
    task: Task = Task.CUSTOM
    model: str = "auto"
    data: str | None = None
    preset: PresetName | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sparse TrainingConfig fields, over the preset."""
    is_auto: bool = False
    """With the sizes of `start --auto`."""


class Change(BaseModel):
    """Something that makes the run fit, or does not."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """`--preset NAME`, or rungs of the ladder."""
    change: str
    fits: bool
    peak_memory_bytes: int | None = None
    untried: str | None = None
    """Why it could not be tried, so that it is not known whether it would fit."""


class SpreadPlan(BaseModel):
    """Over which devices the run is spread."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["off", "ddp", "fsdp"]
    ranks: int
    """Processes, one for each device."""
    why: str
    fits: bool | None
    """Whether the weights on a device leave room to train, by their size. Of shards nothing else is told."""


class Plan(BaseModel):
    """All figures of a run before it. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid")

    config: TrainingConfig
    why_preset: str | None = None
    data: str
    counts: TokenCounts
    length_warning: str = ""
    """Where rows are longer than what the base model was made for."""
    held_out_rows: int
    steps: int
    tokens_in_all: int
    """That the run trains on, over all steps."""
    trial: Trial | None = None
    """None: no step of the config as asked for got through, or its shards take several devices."""
    device: str
    spread: SpreadPlan
    memory_limit_bytes: int
    fits: bool
    problem: str | None = None
    """Why it does not fit."""
    step_s: float | None = None
    """Mean over the steps."""
    run_s: tuple[float, float] | None = None
    """From, to, on one device; loading and evaluations included."""
    checkpoints_bytes: int | None = None
    """The most there are at once."""
    adapter_bytes: int | None = None
    """Of the result: the adapter, or with `tuning="full"` the model."""
    merged_bytes: int
    """Of the whole weights, should an adapter be merged."""
    free_disk_bytes: int
    would_fit: list[Change] = Field(default_factory=list)
    """Alternatives in order; each was measured, or says why it could not be."""
