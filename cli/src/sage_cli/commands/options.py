"""The options that several commands of `sage finetune` share, so that they mean the same in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

TASK_NAMES = ("code", "qa", "chat", "instruction", "custom")
_TASK_HELP = "What the model is for: code, qa, chat, instruction, custom, or a plug-in's task."


def _known_task(name: str | None) -> str | None:
    if name is not None and name not in TASK_NAMES:
        from sage_contracts.config import Task

        try:
            Task(name)  # a plug-in's
        except ValueError:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(TASK_NAMES)}") from None
    return name


TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help=_TASK_HELP, callback=_known_task)]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help=_TASK_HELP, callback=_known_task, show_default="custom"),
]

ModelOption = Annotated[
    str,
    typer.Option("--model", help="Base model: a Hub id, a folder, a built-in name (smollm2-135m), or auto."),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Your rows: a file, a folder of such files, or a Hub id; for `code` also source code.",
        show_default="the task's own",
    ),
]
FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="Your rows: the same as --data.", show_default="the task's own"),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the tuned model.", show_default="the task's")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Settings for a kind of machine: rtx_3060, rtx_4090, a100, minimal, cpu or auto.",
        show_default="auto",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Training settings: a .json, .yaml or .toml file, or an earlier run's training_config.json.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One training setting, such as lora.r=16; may be repeated."
    ),
]
MethodOption = Annotated[
    Literal["sft", "dpo", "orpo", "kto"] | None,
    typer.Option(
        "--method",
        help="Learn from answers (sft) or from preferences (dpo, orpo, kto).",
        show_default="sft",
    ),
]
EpochsOption = Annotated[
    float | None, typer.Option("--epochs", help="Passes over the data.", show_default="the preset's")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def rows_named(file: Path | None, data: Path | None) -> Path | None:
    """What FILE or `--data` says. Raises: typer.BadParameter."""
    if file is None:
        return data
    if data is not None:
        raise typer.BadParameter(f"{file} and --data {data} both name the rows. Leave out one.")
    if str(file) in TASK_NAMES and not file.exists():
        raise typer.BadParameter(f"There is no file {file}. A task is named with --task {file}.")
    return file


def chosen_settings(
    settings: Sequence[str] | None, *, method: str | None, epochs: float | None = None
) -> list[str]:
    """What was set by `--set`, and by the options that stand for settings."""
    chosen = list(settings or [])
    if method is not None:
        chosen.append(f"method={method}")
    if epochs is not None:
        chosen.append(f"num_train_epochs={epochs:g}")
    return chosen
