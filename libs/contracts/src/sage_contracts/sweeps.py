"""Sweeps: one training request over a small grid of settings, each point an ordinary fine-tuning job."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sage_contracts.bounds import GRID_LIMIT_BYTES, Words
from sage_contracts.config import LoRAConfig, Task, TrainingConfig
from sage_contracts.errors import InvalidRequestError
from sage_contracts.jobs import JobError, JobStatus, SageJobOptions
from sage_contracts.setting_names import no_such_setting

MOST_JOBS = 64
_LONGEST_NAME = 64
Grid = dict[str, list[Any]]
Point = dict[str, Any]
"""One value for each field of the grid, under the grid's (dotted) names."""


@dataclass(frozen=True)
class GridWords:
    """How whoever asks for a sweep writes a request: what is wrong with a grid is said in these words."""

    field: str
    """Before a field of the grid."""
    said_once: Mapping[str, str]
    """Where the fields are said that are the same for all jobs."""
    settings: str
    """Where settings of all jobs are said."""
    max_jobs: str


API_WORDS = GridWords(
    field="grid.",
    said_once={
        "model_name": "`model` of the request",
        "data_path": "`training_file` of the request",
        "output_dir": "`sage.name`; the folders follow from it",
        "task": "`sage.task`",
        "preset": "`sage.preset`",
    },
    settings="in sage.config",
    max_jobs="max_jobs",
)
# The jobs are compared by their held-out loss, which has to be the same measure of the same rows.
_SAME_LOSS = (
    "validation_fraction",
    "max_eval_rows",
    "max_length",
    "seed",
    "code_kinds",
    "method",
    "preference_beta",
)


_NEEDED: dict[str, dict[str, Any]] = {"early_stopping_patience": {"eval_steps": 1}}
"""What a field is refused without: a value is looked at alone, and whole points later."""


class SweepStatus(StrEnum):
    """`running` until the last job has ended; then it succeeded if any of them did."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self is not SweepStatus.RUNNING


def _require_small(grid: Grid) -> Grid:
    size_bytes = len(json.dumps(grid, default=str, ensure_ascii=False).encode(errors="replace"))
    if size_bytes > GRID_LIMIT_BYTES:
        raise ValueError(f"has {size_bytes} bytes of JSON, more than {GRID_LIMIT_BYTES}: shorten its values")
    return grid


class CreateSweepRequest(BaseModel):
    """POST /v1/sage/sweeps. All but the last two as in a job's request."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=4096)]
    training_file: Words | None = None
    validation_file: Words | None = None
    sage: SageJobOptions = Field(default_factory=SageJobOptions)
    grid: Annotated[Grid, AfterValidator(_require_small)]
    """Values by field of TrainingConfig: `{"learning_rate": [1e-4, 2e-4], "lora.r": [4, 8]}`."""
    max_jobs: Annotated[int, Field(ge=1, le=MOST_JOBS)] = 16
    """A larger grid is refused, so that a slip of the finger does not cost a week."""


class SweepChild(BaseModel):
    """One point of the grid and how far its job is."""

    job_id: str
    name: str
    point: Point
    status: JobStatus
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    """Of the last step, on the training rows."""
    base_eval_loss: float | None = None
    eval_loss: float | None = None
    fine_tuned_model: str | None = None
    error: JobError | None = None


class Sweep(BaseModel):
    """GET /v1/sage/sweeps/{id}."""

    id: str
    object: Literal["sage.sweep"] = "sage.sweep"
    created_at: int
    finished_at: int | None = None
    status: SweepStatus
    is_cancelling: bool = False
    name: str
    task: Task
    model: str
    grid: Grid
    children: list[SweepChild]
    """In the order of the grid, its last field changing fastest."""
    best_job_id: str | None = None
    """The lowest held-out loss so far."""
    fine_tuned_model: str | None = None
    """The version of `name` that stands on the best job's adapter; set at the end."""


def grid_points(
    grid: Mapping[str, Sequence[Any]], *, max_jobs: int, words: GridWords = API_WORDS
) -> list[Point]:
    """All points of a grid that was looked at as a whole.

    Raises: InvalidRequestError, naming the field and the value, or the number of points.
    """
    if not grid:
        raise InvalidRequestError(
            'The grid is empty: give it a field, such as {"learning_rate": [1e-4, 2e-4]}.', param="grid"
        )
    for name in grid:
        _check_name(name, words)
    for name, values in grid.items():
        if not values:
            raise InvalidRequestError(
                f"{words.field}{name} has no values: give it some, or leave it out.",
                param=f"{words.field}{name}",
            )
    count = math.prod(len(values) for values in grid.values())
    if count > max_jobs:
        sizes = " × ".join(f"{name} {len(values)}" for name, values in grid.items())
        raise InvalidRequestError(
            f"The grid has {count} points ({sizes}), and each is a job: more than {words.max_jobs},"
            f" {max_jobs}. Leave values out, or raise {words.max_jobs} (to {MOST_JOBS} at most).",
            param="grid",
        )
    for name, values in grid.items():
        _check_values(name, values, words)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def sweep_name_fault(name: str, count: int) -> str | None:
    """Why this cannot be the name of a sweep of so many jobs; None when it can."""
    longest = _LONGEST_NAME - len(f"-s{count}")
    if len(name) <= longest:
        return None
    return f"its jobs are called {name}-s1 and so on, so give it at most {longest} characters."


def point_fields(point: Point) -> dict[str, Any]:
    """A point as sparse TrainingConfig fields: `lora.r` becomes `{"lora": {"r": …}}`."""
    fields: dict[str, Any] = {}
    for name, value in point.items():
        folder, _, inner = name.rpartition(".")
        (fields.setdefault(folder, {}) if folder else fields)[inner] = value
    return fields


def point_text(point: Point) -> str:
    """`learning_rate=0.0001, lora.r=4`."""
    return ", ".join(f"{name}={value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A grid's value as people write it."""
    return (
        f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )


def _check_name(name: str, words: GridWords) -> None:
    param = f"{words.field}{name}"
    known = [field for field in TrainingConfig.model_fields if field != "lora"]
    known += [f"lora.{field}" for field in LoRAConfig.model_fields]
    if name in words.said_once:
        raise InvalidRequestError(
            f"{param} is the same for all jobs: use {words.said_once[name]}.", param=param
        )
    if name in _SAME_LOSS:
        raise InvalidRequestError(
            f"{param}: the jobs are compared by their loss on the same held-out rows, and {name} changes"
            f" the rows or the loss: set it for all of them {words.settings}.",
            param=param,
        )
    if name not in known:
        raise InvalidRequestError(f"{param}: {no_such_setting(name, known)}", param=param)


def _check_values(name: str, values: Sequence[Any], words: GridWords) -> None:
    param = f"{words.field}{name}"
    for position, value in enumerate(values):
        if value in values[:position]:
            raise InvalidRequestError(f"{param} has {value_text(value)} twice.", param=param)
        try:
            TrainingConfig.model_validate(_NEEDED.get(name, {}) | point_fields({name: value}))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidRequestError(f"{param}: {value_text(value)}: {reason}", param=param) from None
