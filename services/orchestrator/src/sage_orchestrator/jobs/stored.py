"""What is in a job's row, read again: by another version perhaps, or without the plug-in it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sage_contracts.config import Task, TrainingConfig, preset_fields
from sage_contracts.jobs import Hyperparameters, JobMethod
from sage_orchestrator.rows import JobRow
from sage_servicekit.validation import first_problem

Stored = TypeVar("Stored", bound=BaseModel)
Asked = TypeVar("Asked", bound=Hyperparameters)


@dataclass(frozen=True)
class StoredSettings:
    """How a job is to be trained. Settings that cannot be read are at their defaults."""

    config: TrainingConfig
    hyperparameters: Hyperparameters
    """With the numbers that follow from the config in place of "auto"; so the method's."""
    method: JobMethod
    fault: str | None
    """What cannot be read of its config, and why; None when it all can: then only may the job be trained."""


def read_settings(row: JobRow) -> StoredSettings:
    """Never raises: one row that cannot be read must not hide a list of others."""
    config, why = _read(TrainingConfig, row.config)
    fault = (
        f"sage.config{why}. It was stored by another version of sage, or with a plug-in that is not "
        "installed with the orchestrator: put that back, or create the job anew."
    )
    hyperparameters, _ = _read(Hyperparameters, row.hyperparameters)
    method, _ = _read(JobMethod, row.method)
    if not why:
        hyperparameters = _in_numbers(hyperparameters, config)
        if said := getattr(method, method.type):
            said.hyperparameters = _in_numbers(said.hyperparameters, config)
    return StoredSettings(config, hyperparameters, method, fault if why else None)


def _in_numbers(asked: Asked, config: TrainingConfig) -> Asked:
    """What was left to the preset as it came out; "auto" stays for what OpenAI's field cannot hold, as half
    an epoch."""
    presets_rate = TrainingConfig.model_validate(preset_fields(config.preset or "auto")).learning_rate
    used = {
        "n_epochs": config.num_train_epochs,
        "batch_size": config.effective_batch_size,
        "learning_rate_multiplier": float(f"{config.learning_rate / presets_rate:.6g}"),
    }
    said = {name: value for name, value in asked.model_dump().items() if value != "auto"}
    return _read(type(asked), {**used, **said})[0]


def read_task(name: str) -> Task:
    """The task of that name; CUSTOM for one whose plug-in is not here."""
    try:
        return Task(name)
    except ValueError:
        return Task.CUSTOM


def _read(model: type[Stored], stored: Mapping[str, Any]) -> tuple[Stored, str]:
    """(the model without the fields that it refuses, where and what is wrong with the first or "")."""
    try:
        return model.model_validate(stored), ""
    except ValidationError as error:
        problems = error.errors()
    field, sentence = first_problem(problems)
    refused = {problem["loc"][0] for problem in problems if problem["loc"]}
    try:
        kept = model.model_validate({key: value for key, value in stored.items() if key not in refused})
    except ValidationError:
        kept = model()  # each can be read, but not with the others
    return kept, f".{field}: {sentence}" if field else f": {sentence}"
