"""sage finetune sweep …: one training over a small grid of settings."""

from __future__ import annotations

from typing import Annotated

import typer

from sage_cli.commands.options import (
    ConfigOption,
    DataOption,
    JsonOption,
    MethodOption,
    ModelOption,
    PresetOption,
    SetOption,
    TaskOption,
    chosen_settings,
)
from sage_cli.groups import FastHelpGroup

SweepArgument = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A sweep's id, or its name: the newest one.")
]

app = typer.Typer(
    cls=FastHelpGroup, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback(invoke_without_command=True)
def sweep(
    context: typer.Context,
    task: TaskOption = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="KEY=V1,V2",
            help="Values to try for a setting: learning_rate=1e-4,2e-4; may be repeated.",
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Choose model, preset, data and short runs; say which."),
    ] = False,
    model: ModelOption = "auto",
    data: DataOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name that the best model gets.", show_default="the task's")
    ] = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    max_jobs: Annotated[
        int, typer.Option("--max-jobs", min=1, max=64, help="Refuse a grid with more points.")
    ] = 16,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show the table.")] = True,
) -> None:
    """Compare settings: train each combination.

    One job for each point of the grid; the model with the lowest held-out loss gets the name.
    """
    if context.invoked_subcommand is not None:
        return
    from sage_cli.jobs.sweep import start_command
    from sage_cli.jobs.wish import JobWish

    chosen = chosen_settings(settings, method=method)
    start_command(
        JobWish(task, model=model, data=data, name=name, preset=preset, config=config, settings=chosen),
        grid or [],
        max_jobs=max_jobs,
        is_auto=auto,
        is_watching=watch,
    )


@app.command()
def show(sweep: SweepArgument, as_json: JsonOption = False) -> None:
    """Show the table of a sweep: points, states, losses."""
    from sage_cli.jobs.sweep import show_command

    show_command(sweep, as_json=as_json)


@app.command("watch")
def watch_sweep(sweep: SweepArgument) -> None:
    """Follow a sweep until its last job ends. Ctrl-C leaves; the sweep goes on."""
    from sage_cli.jobs.sweep import watch_command

    watch_command(sweep)


@app.command()
def cancel(sweep: SweepArgument) -> None:
    """Cancel what has not ended; models that were trained stay."""
    from sage_cli.jobs.sweep import cancel_command

    cancel_command(sweep)
