"""sage finetune …: from data to a training job, and the jobs. Tuned models: `tuned`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sage_cli.commands import sweep as sweeps
from sage_cli.commands import tuned
from sage_cli.commands.options import (
    ConfigOption,
    DataOption,
    EpochsOption,
    FileArgument,
    JsonOption,
    MethodOption,
    ModelOption,
    NameOption,
    PresetOption,
    SetOption,
    TaskArgument,
    TaskOption,
    chosen_settings,
    rows_named,
)
from sage_cli.groups import FastHelpGroup

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's id, or a model's name: its newest job.")
]

app = typer.Typer(
    cls=FastHelpGroup,
    help="Train, follow, merge and use your own models.",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def quickstart(
    task: TaskArgument = "code",
    model: ModelOption = "auto",
    data: DataOption = None,
    name: NameOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Taken for scripts' sake: nothing is asked anyway.")
    ] = False,
) -> None:
    """From nothing to a model of your own.

    Starts what is needed, trains for a few minutes, and lets the base and the tuned model answer the same
    question.
    """
    from sage_cli.jobs.quickstart import quickstart_command
    from sage_cli.jobs.wish import JobWish

    quickstart_command(
        JobWish(
            task, model=model, data=data, name=name, preset=preset, config=config, settings=settings or []
        )
    )


@app.command()
def start(
    file: FileArgument = None,
    task: TaskOption = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Choose model, preset, data and a short run by itself, and say which."),
    ] = False,
    model: ModelOption = "auto",
    data: DataOption = None,
    name: NameOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    epochs: EpochsOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show progress.")] = True,
) -> None:
    """Start a training job, and show its progress.

    Trains on your rows, or on the task's own; they are checked before anything is queued.
    """
    from sage_cli.jobs.start import start_command
    from sage_cli.jobs.wish import JobWish

    chosen = chosen_settings(settings, method=method, epochs=epochs)
    data = rows_named(file, data)
    start_command(
        JobWish(task, model=model, data=data, name=name, preset=preset, config=config, settings=chosen),
        is_auto=auto,
        is_watching=watch,
    )


@app.command()
def plan(
    file: FileArgument = None,
    task: TaskOption = None,
    auto: Annotated[bool, typer.Option("--auto", help="As `start --auto` would choose.")] = False,
    model: ModelOption = "auto",
    data: DataOption = None,
    name: NameOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    epochs: EpochsOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would take, before it is started.

    Counts tokens, and measures memory and time with a real step on the longest rows. Needs no server.
    """
    from sage_cli.jobs.plan import plan_command
    from sage_cli.jobs.wish import JobWish

    chosen = chosen_settings(settings, method=method, epochs=epochs)
    data = rows_named(file, data)
    plan_command(
        JobWish(task, model=model, data=data, name=name, preset=preset, config=config, settings=chosen),
        is_auto=auto,
        as_json=as_json,
    )


@app.command()
def validate(
    data: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of rows, a folder of such files, or a Hub id.")
    ],
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="Tokens beyond which training would cut a row.")
    ] = 1024,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Check and count for this base model: its template, its tokenizer."),
    ] = None,
    method: Annotated[
        Literal["sft", "dpo", "orpo", "kto"] | None,
        typer.Option("--method", help="What the rows are for; otherwise what most of them look like."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check training data, before a run.

    Which rows cannot be used and why, how long they are, and what a run would cut. Needs no server; exit code
    2 when a row, or the file as a whole, cannot be used.
    """
    from sage_cli.jobs.validate import validate_command

    validate_command(data, max_length=max_length, model=model, method=method, as_json=as_json)


@app.command()
def preview(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="Your rows: a file, a folder or a Hub id.", show_default="the task's own"
        ),
    ] = None,
    task: TaskOption = None,
    method: MethodOption = None,
    model: ModelOption = "auto",
    config: ConfigOption = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, max=1000, help="How many rows.")] = 3,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=2,
            help="Tokens of a row that the model sees.",
            show_default="512; with an NVIDIA card 1024",
        ),
    ] = None,
    with_tokens: Annotated[bool, typer.Option("--tokens", help="Show where each token ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show rows as the model will see them.

    Rendered by its own chat template, cut as a run would, coloured by what is learned. Needs no server.
    """
    from sage_cli.jobs.wish import JobWish
    from sage_cli.preview.command import preview_command

    chosen = chosen_settings([], method=method)
    preview_command(
        JobWish(task, model=model, data=data, config=config, settings=chosen),
        rows=rows,
        max_length=max_length,
        with_tokens=with_tokens,
        as_json=as_json,
    )


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many jobs.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from sage_cli.jobs.show import list_command

    list_command(limit=limit, as_json=as_json)


@app.command()
def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one job: settings, progress, results, files."""
    from sage_cli.jobs.show import show_command

    show_command(job, as_json=as_json)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Every step too.")] = False,
) -> None:
    """Print a job's events, oldest first."""
    from sage_cli.jobs.show import logs_command

    logs_command(job, is_following=follow, with_metrics=metrics)


@app.command()
def watch(job: JobArgument) -> None:
    """Follow a job with a live bar. Ctrl-C leaves; the job goes on."""
    from sage_cli.jobs.start import watch_command

    watch_command(job)


@app.command()
def cancel(job: JobArgument) -> None:
    """Stop a job for good."""
    from sage_cli.jobs.show import act_command

    act_command(job, "cancel")


@app.command()
def pause(job: JobArgument) -> None:
    """Stop a job after a checkpoint, to resume later."""
    from sage_cli.jobs.show import act_command

    act_command(job, "pause")


@app.command()
def resume(job: JobArgument) -> None:
    """Put a paused job back into the queue."""
    from sage_cli.jobs.show import act_command

    act_command(job, "resume")


app.add_typer(tuned.app)
app.add_typer(sweeps.app, name="sweep")
