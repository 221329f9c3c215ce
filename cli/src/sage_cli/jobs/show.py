"""sage finetune list, show, logs, cancel, pause, resume."""

from __future__ import annotations

import time

import typer
from rich.console import Console
from rich.text import Text

from sage_cli import render
from sage_cli.client import Client
from sage_cli.failures import print_json
from sage_cli.jobs import outcome
from sage_cli.jobs.find import find_job
from sage_cli.jobs.follow import EventFeed, follow
from sage_cli.jobs.views import figures
from sage_contracts.errors import NotFoundError
from sage_contracts.jobs import FineTuningJob, JobCheckpoint, JobEvent, JobStatus

_DONE_TEXT = {"cancel": "cancelled", "pause": "paused", "resume": "queued again"}


def list_command(*, limit: int, as_json: bool) -> None:
    with Client.from_env() as client:
        jobs = client.jobs(limit)
    if as_json:
        print_json([job.model_dump(mode="json") for job in jobs])
    elif not jobs:
        typer.echo("No jobs yet. Start one: sage finetune quickstart code")
    else:
        show_jobs(render.output(), jobs)


def show_jobs(console: Console, jobs: list[FineTuningJob]) -> None:
    """A table, newest first."""
    now = time.time()
    rows = [
        [
            job.id,
            job.sage.name,
            job.status.value,
            progress_text(job),
            f"{render.age_text(job.created_at, now)} ago",
        ]
        for job in jobs
    ]
    render.table(console, ["JOB", "NAME", "STATE", "PROGRESS", "CREATED"], rows, flexible=3)


def progress_text(job: FineTuningJob) -> str:
    """One cell: the model when done, the step while running, the reason when failed."""
    metrics = job.sage.metrics
    match job.status:
        case JobStatus.SUCCEEDED:
            both = metrics.base_eval_loss is not None and metrics.eval_loss is not None
            losses = f"  {metrics.base_eval_loss:.3f} → {metrics.eval_loss:.3f}" if both else ""
            return f"{job.fine_tuned_model}{losses}"
        case JobStatus.FAILED:
            return job.error.message.splitlines()[0] if job.error else ""
        case _ if metrics.step is not None:
            loss = f"  loss {metrics.loss:.3f}" if metrics.loss is not None else ""
            return f"step {metrics.step}/{metrics.total_steps or '?'}{loss}"
        case _:
            return metrics.phase or ""


def show_command(given: str, *, as_json: bool) -> None:
    with Client.from_env() as client:
        job = find_job(client, given)
        if as_json:
            print_json(job.model_dump(mode="json"))
            return
        data = _data_text(client, job)
        checkpoints = client.checkpoints(job.id) if job.fine_tuned_model else []
    console = render.output()
    config, metrics = job.sage.config, job.sage.metrics
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    rows = [
        ("state", job.status.value),
        ("task", job.sage.task.value),
        ("method", config.method),
        ("data", data),
        ("base model", config.model_name),
        ("preset", job.sage.preset.value if job.sage.preset else "none"),
        (
            "training",
            f"{length}, batch {config.effective_batch_size}, learning rate {config.learning_rate:g}",
        ),
        *outcome.settings_rows(config),
        ("created", render.clock_text(job.created_at)),
    ]
    if job.finished_at:
        rows.append(("finished", render.clock_text(job.finished_at)))
    if metrics.oom_rungs:
        rows.append(("memory", f"did not suffice at first: {', '.join(metrics.oom_rungs)}"))
    if metrics.step is not None:
        rows.append(
            ("progress", f"step {metrics.step}/{metrics.total_steps or '?'}  {'  '.join(figures(metrics))}")
        )
    rows += outcome.quality_rows(metrics)
    rows += outcome.reward_rows(metrics)
    if job.fine_tuned_model:
        rows.append(("model", job.fine_tuned_model))
        rows += _checkpoint_rows(checkpoints)
        rows.append(("files", outcome.output_folder(job)))
    if job.sage.unreadable:
        rows.append(("unreadable", job.sage.unreadable))
    if job.error:
        rows.append(("error", job.error.message))
    if job.sage.attempt > 1:
        rows.append(("attempts", str(job.sage.attempt)))
    console.print(Text(f"{job.id}  {job.sage.name}", style="bold"))
    outcome.facts(console, rows)


def _data_text(client: Client, job: FineTuningJob) -> str:
    """The names under which its files were given."""
    if job.training_file.startswith("builtin:"):
        return "rows that come with the task"
    held_out = f"; held out: {_filename(client, job.validation_file)}" if job.validation_file else ""
    return f"{_filename(client, job.training_file)}{held_out}"


def _filename(client: Client, file_id: str) -> str:
    try:
        return client.file(file_id).filename
    except NotFoundError:
        return f"{file_id} (deleted since)"


def _checkpoint_rows(checkpoints: list[JobCheckpoint]) -> list[tuple[str, str]]:
    """The steps that can be chatted with, and how; nothing where there are none."""
    there = [checkpoint for checkpoint in reversed(checkpoints) if checkpoint.sage.is_servable]
    if not there:
        return []
    steps = ", ".join(str(checkpoint.step_number) for checkpoint in there)
    return [("checkpoints", f"of step {steps}; chat with {there[-1].fine_tuned_model_checkpoint}")]


def logs_command(given: str, *, is_following: bool, with_metrics: bool) -> None:
    with Client.from_env() as client:
        job = find_job(client, given)
        lines = _LogLines()
        if not is_following:
            for event in EventFeed(client, job.id, with_metrics=with_metrics).new():
                lines.event(event)
            return
        with outcome.detaching(job.id):
            follow(client, job.id, lines, with_metrics=with_metrics)


class _LogLines:
    """One line an event, as logs are read: time, level, message."""

    def event(self, event: JobEvent) -> None:
        when = render.clock_text(event.created_at)
        typer.echo(f"{when}  {event.level.value:<5}  {event.message}")

    def progress(self, job: FineTuningJob) -> None:
        return


def act_command(given: str, verb: str) -> None:
    with Client.from_env() as client:
        job = client.act(find_job(client, given).id, verb)
    if job.status in (JobStatus.CANCELLED, JobStatus.PAUSED, JobStatus.QUEUED):
        typer.echo(f"{job.id} is {_DONE_TEXT[verb]}.")
    else:
        typer.echo(
            f"{job.id}: {verb} was asked for; it is {job.status.value} until the trainer has heard of it."
        )
