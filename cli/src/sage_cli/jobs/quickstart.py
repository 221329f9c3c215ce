"""sage finetune quickstart: from nothing to a model of one's own."""

from __future__ import annotations

from sage_cli import render
from sage_cli.client import Client
from sage_cli.jobs import outcome
from sage_cli.jobs.follow import follow
from sage_cli.jobs.probe import compare
from sage_cli.jobs.submit import check, submit, why_preset
from sage_cli.jobs.views import view_for
from sage_cli.jobs.wish import JobWish
from sage_cli.stack.updown import ensure_stack


def quickstart_command(wish: JobWish) -> None:
    checked = check(wish)
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        job = submit(client, checked.sized_for(client))
        outcome.show_choices(console, job, checked.data, why_preset(client, job))
        try:
            with view_for(console) as view:
                job = follow(client, job.id, view)
        except KeyboardInterrupt:
            raise outcome.detached(job.id) from None
        outcome.require_success(job)
        outcome.show_result(console, job)
        compare(console, client, job, checked.data)
    console.print()
    console.print(f"Go on: sage chat --backend finetune --finetune-model {job.sage.name}", soft_wrap=True)
