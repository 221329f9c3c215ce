"""What `auto` means, and which base models can be named: answered for the machine that will train."""

from __future__ import annotations

from sage_contracts import auto
from sage_contracts.config import PresetName, Task
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError
from sage_contracts.home import Home
from sage_orchestrator import bases

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


def choose_model(asked: str, task: Task, home: Home, trainer: TrainingDevice | None) -> str:
    """A base model that can be trained on: a Hub id, a folder, or a name that is known here.

    Raises: ModelNotFoundError, naming what there is; InvalidRequestError for a tuned model.
    """
    if asked == "auto":
        return _default_model(task, trainer)
    name = asked.removeprefix("base:")
    if "@" in name:
        raise InvalidRequestError(
            f"{asked} is a tuned model, and training goes on from base models only: name its base.",
            param="model",
        )
    if bases.find_folder(name, home) is not None or name in bases.trainable(home):
        return name
    # An id that looks like the Hub's may be fetched by the trainer; a path that is not there stays so.
    if bases.is_hub_id(name) and not bases.is_folder_path(name):
        return name
    what = "model folder" if bases.is_folder_path(name) else "base model"
    known = ", ".join(bases.closest_first(name, bases.trainable(home)))
    raise ModelNotFoundError(
        f"There is no {what} {name!r}. There are: {known}; or give a Hub id such as "
        "Qwen/Qwen2.5-Coder-1.5B-Instruct, or a folder with a Hugging Face model.",
        param="model",
    )


def _default_model(task: Task, trainer: TrainingDevice | None) -> str:
    from sage.tools.finetune import base_models

    if trainer is None:
        return base_models.default_model(task)
    return base_models.SMOLLM2 if trainer[0] == "cpu" else base_models.GPU_DEFAULT
