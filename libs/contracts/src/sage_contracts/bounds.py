"""How much may be written into a job: it is kept for good, and every list of jobs tells all of it.

Not bounds of TrainingConfig's own fields: a run without a stack may have more, and jobs that were stored
with more can still be read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

CONFIG_LIMIT_BYTES = 256 * 1024
"""Of a job's whole TrainingConfig as JSON."""
GRID_LIMIT_BYTES = 32 * 1024
"""Of a sweep's grid as JSON: each of its jobs has a part of it as labels besides."""

Words = Annotated[str, Field(max_length=256)]
"""A name, a tag, an id."""
Tags = Annotated[list[Words], Field(max_length=64)]
_Choices = Annotated[list[str], Field(max_length=64)]
"""Of a few known words, which may be said again."""


class BoundedLoRA(BaseModel):
    target_modules: Annotated[list[Words], Field(max_length=1024)] | Literal["all-linear"]


class BoundedConfig(BaseModel):
    """The fields of TrainingConfig that hold any amount of text, under their names there."""

    trainer: Words
    sample_prompts: Annotated[list[Annotated[str, Field(max_length=16 * 1024)]], Field(max_length=64)]
    code_kinds: _Choices
    oom_ladder: _Choices | str
    report_to: _Choices
    wandb_project: Words | None
    wandb_entity: Words | None
    wandb_run_name: Words | None
    wandb_tags: Tags
    lora: BoundedLoRA
