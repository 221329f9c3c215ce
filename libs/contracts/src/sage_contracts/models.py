"""Tuned models: immutable versions, the aliases that move, merges, and what resolves a name."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sage_contracts.bounds import Words

_CHECKPOINT_MARK = ":ckpt-step-"
# More digits than this do not fit into the database's column.
_CHECKPOINT = re.compile(rf"(.+){_CHECKPOINT_MARK}([0-9]{{1,9}})")


def checkpoint_name(version: str, step: int) -> str:
    """What a checkpoint of the job that makes this version is called."""
    return f"{version}{_CHECKPOINT_MARK}{step}"


def split_checkpoint(name: str) -> tuple[str, int] | None:
    """(the version whose job made it, its step) of a checkpoint's name; None for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return (found[1], int(found[2])) if found else None


class ModelCard(BaseModel):
    """OpenAI's model object with our additions."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sage"
    sage: ModelInfo | None = None


class ModelInfo(BaseModel):
    """What is known of a tuned model's version."""

    name: str
    version: int
    alias_of: str | None = None
    """Set on the entry of an alias: the version it points to now."""
    task: str | None = None
    """By its name: whoever lists or relays models need not have the plug-in that brings their task."""
    job_id: str | None = None
    base_model: str
    """What the adapter stands on; of a model tuned in full, its own folder."""
    adapter_path: str
    """Empty for a model tuned in full."""
    merged_path: str | None = None
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


class ResolvedModel(BaseModel):
    """What serving a name needs. Paths are relative to SAGE_HOME, or absolute."""

    model_config = ConfigDict(extra="forbid")

    id: str
    """Immutable: `code@3`, its job's checkpoint `code@3:ckpt-step-50`, or `base:<model>` for a plain base."""
    base_model: str
    adapter_path: str | None = None
    merged_path: str | None = None
    """Base and adapter in one folder, where that has been made: for engines that cannot load the adapter."""
    max_lora_rank: int = 16
    turn_end_ids: list[int] = []
    """Tokens that it was taught to end its answers with: its base may stop at others only."""


class MergeStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in (MergeStatus.SUCCEEDED, MergeStatus.FAILED)


ExportFormat = Literal["safetensors", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m", "ollama", "zip", "hub"]
"""`safetensors` is the plain merge; the others are written for programs that want something else."""
ExportContent = Literal["merged", "adapter"]
WeightsDtype = Literal["auto", "fp32", "fp16", "bf16"]


class MergeRequest(BaseModel):
    """POST /v1/sage/models/{name}/merge."""

    model_config = ConfigDict(extra="forbid")

    dtype: WeightsDtype = "auto"
    """Of merged weights in safetensors; GGUF's formats name their own."""
    format: ExportFormat = "safetensors"
    content: ExportContent = "merged"
    """What an archive or a repository holds."""
    repo: Words | None = None
    """Of the Hub: `owner/name`. Made private where there is none."""
    allow_public: bool = False
    """Whether a repository that everybody may read is taken too."""

    @model_validator(mode="after")
    def _fits_together(self) -> MergeRequest:
        if (self.repo is None) == (self.format == "hub"):
            raise ValueError("repo goes with the format hub, and hub needs one: owner/name")
        if ":" in (self.repo or ""):
            raise ValueError("repo is owner/name, and no address")
        if self.allow_public and self.format != "hub":
            raise ValueError("allow_public goes with the format hub")
        if self.content == "adapter" and self.format not in ("zip", "hub"):
            raise ValueError("content=adapter goes with the formats zip and hub")
        return self

    @property
    def has_weights_of_dtype(self) -> bool:
        """Whether what is written depends on `dtype`."""
        return self.content == "merged" and self.format in ("safetensors", "zip", "hub")


class MergeJob(BaseModel):
    """GET /v1/sage/merges/{id}."""

    id: str
    object: Literal["sage.merge"] = "sage.merge"
    model: str
    status: MergeStatus
    phase: str | None = None
    created_at: int
    finished_at: int | None = None
    format: ExportFormat = "safetensors"
    dtype: WeightsDtype = "auto"
    """As it was asked for."""
    merged_path: str | None = None
    """Of a merge in safetensors, which is the version's from then on."""
    result_path: str | None = None
    """What was written, in whichever format; relative to SAGE_HOME."""
    report: dict[str, Any] = Field(default_factory=dict)
    """`parity`: adapter and result on the same questions; `size_bytes`; `notes`; `url` on the Hub."""
    error: str | None = None
