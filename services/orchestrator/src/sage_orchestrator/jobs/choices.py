"""What `auto` means, and which base models can be named: answered for the machine that will train."""

from __future__ import annotations

from sage_contracts import auto
from sage_contracts.config import PresetName, Task
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError
from sage_contracts.home import Home
from sage_contracts.models import split_checkpoint
from sage_orchestrator import bases
from sage_orchestrator.models.service import ModelService, version_id
from sage_orchestrator.rows import VersionRow

_TUNED = "finetune/"
"""As chat names them, so that nobody's own model is taken for a repository of an owner of this name."""
_BASE = "base:"

TrainingDevice = tuple[str, int]
"""Name (`cpu`, `cuda:0`) and bytes of the trainer's device."""


def choose_preset(
    asked: PresetName | None, model: str, home: Home, trainer: TrainingDevice | None
) -> tuple[PresetName, str]:
    """(the preset as asked, else the one for the model on the trainer's device, else on this machine's; why).

    The reason is empty when nothing was chosen.
    """
    if asked is not None and asked is not PresetName.AUTO:
        return asked, ""
    from sage.tools.finetune.model_size import parameters_of

    if trainer is None:
        from sage_servicekit.machine import find_device

        device = find_device()
        trainer = (device.name, device.total_bytes)
    choice = auto.choose_preset(*trainer, parameters_of(model, home.root))
    return choice.preset, choice.why


def choose_model(
    asked: str, task: Task, home: Home, trainer: TrainingDevice | None, models: ModelService
) -> str:
    """A base model that can be trained on: a Hub id, a folder, or a name that is known here.

    Raises: ModelNotFoundError, naming what there is; InvalidRequestError for a tuned model.
    """
    if asked == "auto":
        return _default_model(task, trainer)
    name = asked.removeprefix(_TUNED)
    # Jobs start from bases: whoever gives a model a base's name does not keep others from that base.
    is_base = name.startswith(_BASE) or (name == asked and bases.is_known(name, home))
    name = name.removeprefix(_BASE)
    if not is_base and (version := models.find_tuned(name)):
        raise _is_tuned(asked, name, version, home)
    is_path = bases.is_folder_path(name, home)
    what = f"model folder {name!r}" if is_path else f"base model {name!r}"
    if asked.startswith(_TUNED) and not is_base:
        what = f"tuned model {name!r}, and jobs start from base models"
    # An id that looks like the Hub's may be fetched by the trainer; a path that is not there stays so.
    elif bases.is_known(name, home) or (bases.is_hub_id(name) and not is_path):
        return name
    known = ", ".join(bases.closest_first(name, bases.trainable(home)))
    raise ModelNotFoundError(
        f"There is no {what}. There are: {known}; or give a Hub id such as "
        "Qwen/Qwen2.5-Coder-1.5B-Instruct, or a folder with a Hugging Face model.",
        param="model",
    )


def _is_tuned(asked: str, name: str, version: VersionRow, home: Home) -> InvalidRequestError:
    what = "a checkpoint of the tuned model" if split_checkpoint(name) else "the tuned model"
    return InvalidRequestError(
        f"{asked} is {what} {version_id(version)}, and jobs start from whole models, not from adapters: "
        f"{_way_on(version, home)}.",
        param="model",
    )


def _way_on(version: VersionRow, home: Home) -> str:
    """How a job can start from what this version has learned."""
    whole = version.merged_path if version.adapter_path else version.base_model
    if whole and (not version.adapter_path or bases.find_folder(whole, home)):
        return f"name that model's whole weights, model={whole!r}"
    folder = home.finetune_output / version.name / "versions" / str(version.version) / "merged_model"
    return (
        f"merge it with `sage finetune merge {version_id(version)}`, "
        f"then name the merged folder, model={home.relative(folder)!r}"
    )


def _default_model(task: Task, trainer: TrainingDevice | None) -> str:
    from sage.tools.finetune import base_models

    if trainer is None:
        return base_models.default_model(task)
    return base_models.SMOLLM2 if trainer[0] == "cpu" else base_models.GPU_DEFAULT
