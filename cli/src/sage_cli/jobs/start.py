"""sage finetune start and watch."""

from __future__ import annotations

import typer

from sage_cli import render
from sage_cli.client import Client
from sage_cli.jobs import outcome
from sage_cli.jobs.find import find_job
from sage_cli.jobs.follow import follow
from sage_cli.jobs.submit import check, submit, why_preset
from sage_cli.jobs.views import view_for
from sage_cli.jobs.wish import JobWish
from sage_cli.stack.updown import ensure_stack
from sage_contracts.jobs import FineTuningJob


def start_command(wish: JobWish, *, is_auto: bool, is_watching: bool) -> None:
    checked = check(wish)
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        job = submit(client, checked.sized_for(client) if is_auto else checked)
        outcome.show_choices(console, job, checked.data, why_preset(client, job))
        if not is_watching:
            typer.echo(f"Queued. Follow it with: sage finetune watch {job.id}")
            return
        watch(client, job)


def watch_command(job: str) -> None:
    with Client.from_env() as client:
        watch(client, find_job(client, job))


def watch(client: Client, job: FineTuningJob) -> FineTuningJob:
    """Follow to the end and tell the result. Raises: TrainingFailedError; typer.Exit when detached."""
    console = render.output()
    try:
        with view_for(console) as view:
            job = follow(client, job.id, view)
    except KeyboardInterrupt:
        raise outcome.detached(job.id) from None
    outcome.require_success(job)
    outcome.show_result(console, job)
    console.print(
        f"Chat with it: sage chat --backend finetune --finetune-model {job.sage.name}", soft_wrap=True
    )
    return job
