"""From what a person asked for to the one complete TrainingConfig that is stored. Functions of data."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from sage_contracts.bounds import CONFIG_LIMIT_BYTES, BoundedConfig
from sage_contracts.config import Method, PresetName, Task, TrainingConfig, overlay, preset_fields
from sage_contracts.errors import InvalidRequestError
from sage_contracts.jobs import (
    CreateJobRequest,
    Hyperparameters,
    Integration,
    JobMethod,
    PreferenceHyperparameters,
    PreferenceMethod,
    Seed,
    SupervisedMethod,
)
from sage_contracts.setting_names import no_such_setting
from sage_servicekit.validation import first_problem

_SEED = TypeAdapter(Seed)
# Said elsewhere in the request, so that there is one place for each.
_SAID_ELSEWHERE = {
    "model_name": "`model` of the request",
    "data_path": "`training_file` of the request",
    "output_dir": "`suffix` of the request; the folder follows from it",
    "task": "`sage.task`",
    "preset": "`sage.preset`",
}


def task_of(request: CreateJobRequest) -> Task:
    """The task: as said, else custom for somebody's own file. Raises: InvalidRequestError without either."""
    task = request.sage.task
    if learning_of(request) != "sft":
        return task or Task.CUSTOM  # the preference methods bring data of their own for every task
    if task is None and request.training_file is None:
        raise InvalidRequestError(
            "Give a training_file, or one of the tasks that bring their own data: "
            "sage.task = code, qa, chat or instruction.",
            param="training_file",
        )
    if task is Task.CUSTOM and request.training_file is None:
        raise InvalidRequestError("The task `custom` needs a training_file.", param="training_file")
    return task or Task.CUSTOM


def learning_of(request: CreateJobRequest) -> Method:
    """The training method: `method` of the request, or `sage.config.method`. Raises: InvalidRequestError."""
    given = request.method.learning if request.method else None
    said = request.sage.config.get("method")
    if given and said and given != said:
        raise InvalidRequestError(
            f"method says {given!r} and sage.config.method says {said!r}: give one of them.", param="method"
        )
    return given or said or "sft"


def name_of(request: CreateJobRequest, job_id: str) -> str:
    """What the tuned model will be called: suffix, else the task if named, else `ft-` and eight digits."""
    if request.sage.name and request.suffix and request.sage.name != request.suffix:
        raise InvalidRequestError(
            f"suffix says {request.suffix!r} and sage.name says {request.sage.name!r}: give one of them.",
            param="suffix",
        )
    given = request.suffix or request.sage.name
    if given:
        return given
    return request.sage.task.value if request.sage.task else f"ft-{job_id[-8:]}"


def hyperparameters_of(request: CreateJobRequest) -> Hyperparameters:
    """`method` wins over the deprecated field at the top, field by field."""
    top = request.hyperparameters or Hyperparameters()
    method = request.method.hyperparameters if request.method else None
    if method is None:
        return top
    said = {key: value for key, value in method.model_dump().items() if value != "auto"}
    return type(method).model_validate({**top.model_dump(), **said})


def method_of(config: TrainingConfig, asked: Hyperparameters) -> JobMethod:
    """The method as the job's object shows it."""
    if config.method == "sft":
        return JobMethod(supervised=SupervisedMethod(hyperparameters=asked))
    shown = {**asked.model_dump(), "beta": config.preference_beta}
    settings = PreferenceMethod(hyperparameters=PreferenceHyperparameters.model_validate(shown))
    return JobMethod.model_validate({"type": config.method, config.method: settings})


def resolve_config(
    request: CreateJobRequest, *, task: Task, preset: PresetName, model: str, output_dir: str
) -> TrainingConfig:
    """Preset, then hyperparameters, then `sage.config`; the later wins. Raises: InvalidRequestError."""
    _refuse_said_elsewhere(request.sage.config)
    fields = preset_fields(preset)
    fields |= _fields_of(hyperparameters_of(request), TrainingConfig.model_validate(fields))
    fields["method"] = learning_of(request)
    if request.seed is not None:
        fields["seed"] = request.seed
    for integration in request.integrations or []:
        fields |= _tracking_fields(integration)
    fields = overlay(fields, request.sage.config)
    fields |= {"task": task, "preset": preset, "model_name": model, "output_dir": output_dir}
    try:
        config = TrainingConfig.model_validate(fields)
        BoundedConfig.model_validate(config.model_dump())
    except ValidationError as error:
        where, sentence = first_problem(error.errors())
        field = f"sage.config.{where}" if where else "sage.config"
        if error.errors()[0]["type"] == "extra_forbidden":
            sentence = no_such_setting(where)
        raise InvalidRequestError(f"{field}: {sentence}", param="sage.config") from None
    _require_seed(config.seed)
    size_bytes = len(config.model_dump_json().encode())
    if size_bytes > CONFIG_LIMIT_BYTES:
        raise InvalidRequestError(
            f"sage.config: the job's settings have {size_bytes} bytes, more than {CONFIG_LIMIT_BYTES}:"
            " shorten its longest lists and texts.",
            param="sage.config",
        )
    return config


def _require_seed(seed: int) -> None:
    # Not a bound of the field itself: jobs were stored with others, which plain fine-tuning could use.
    try:
        _SEED.validate_python(seed)
    except ValidationError as error:
        _, sentence = first_problem(error.errors())
        raise InvalidRequestError(f"sage.config.seed: {sentence}", param="sage.config") from None


def _tracking_fields(integration: Integration) -> dict[str, Any]:
    wandb = integration.wandb
    return {
        "report_to": ["tensorboard", "wandb"],
        "wandb_project": wandb.project,
        "wandb_entity": wandb.entity,
        "wandb_run_name": wandb.name,
        "wandb_tags": wandb.tags or [],
    }


def _fields_of(asked: Hyperparameters, base: TrainingConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.n_epochs != "auto":
        fields["num_train_epochs"] = asked.n_epochs
    if asked.learning_rate_multiplier != "auto":
        fields["learning_rate"] = base.learning_rate * asked.learning_rate_multiplier
    if isinstance(asked, PreferenceHyperparameters) and asked.beta != "auto":
        fields["preference_beta"] = asked.beta
    if asked.batch_size != "auto":
        # What fits on the device at once is the preset's to say; the rest is accumulated.
        at_once = next(
            size for size in range(base.per_device_train_batch_size, 0, -1) if asked.batch_size % size == 0
        )
        fields["per_device_train_batch_size"] = at_once
        fields["gradient_accumulation_steps"] = asked.batch_size // at_once
    return fields


def _refuse_said_elsewhere(sparse: dict[str, Any]) -> None:
    for field, where in _SAID_ELSEWHERE.items():
        if field in sparse:
            raise InvalidRequestError(
                f"sage.config.{field} is not set here: use {where}.", param="sage.config"
            )
