"""sage finetune start and watch."""

from __future__ import annotations

import typer

from sage_cli import render
from sage_cli.client import Client
from sage_cli.jobs import outcome
from sage_cli.jobs.find import find_job
from sage_cli.jobs.follow import follow
from sage_cli.jobs.submit import CheckedWish, check, submit, why_preset
from sage_cli.jobs.views import view_for
from sage_cli.jobs.wish import JobWish
from sage_cli.stack.updown import ensure_stack
from sage_contracts.jobs import FineTuningJob


def start_command(wish: JobWish, *, is_auto: bool, is_watching: bool) -> None:
    checked = check(wish)
    ensure_stack()
    with Client.from_env() as client:
        job = start(client, checked.sized_for(client) if is_auto else checked, is_watching=is_watching)
        if is_watching:
            _say_how_to_chat(job)
        else:
            typer.echo(f"Queued. Follow it with: sage finetune watch {job.id}")


def watch_command(given: str) -> None:
    with Client.from_env() as client:
        job = find_job(client, given)
        with outcome.detaching(job.id):
            job = _follow_to_the_end(client, job)
        _tell_result(job)
        _say_how_to_chat(job)


def start(client: Client, wish: CheckedWish, *, is_watching: bool) -> FineTuningJob:
    """Queue a job, say how it was set up, and follow it to its result.

    Raises: SageError, TrainingFailedError; typer.Exit when detached.
    """
    job = submit(client, wish)
    with outcome.detaching(job.id):
        outcome.show_choices(render.output(), job, wish.data, why_preset(client, job))
        if not is_watching:
            return job
        job = _follow_to_the_end(client, job)
    _tell_result(job)
    return job


def _follow_to_the_end(client: Client, job: FineTuningJob) -> FineTuningJob:
    with view_for(render.output()) as view:
        return follow(client, job.id, view)


def _tell_result(job: FineTuningJob) -> None:
    outcome.require_success(job)
    outcome.show_result(render.output(), job)


def _say_how_to_chat(job: FineTuningJob) -> None:
    render.output().print(
        f"Chat with it: sage chat --backend finetune --finetune-model {job.sage.name}", soft_wrap=True
    )
