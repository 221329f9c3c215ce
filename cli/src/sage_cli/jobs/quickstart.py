"""sage finetune quickstart: from nothing to a model of one's own."""

from __future__ import annotations

from sage_cli import render
from sage_cli.client import Client
from sage_cli.jobs.probe import compare
from sage_cli.jobs.start import start
from sage_cli.jobs.submit import check
from sage_cli.jobs.wish import JobWish
from sage_cli.stack.updown import ensure_stack


def quickstart_command(wish: JobWish) -> None:
    checked = check(wish)
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        job = start(client, checked.sized_for(client), is_watching=True)
        compare(console, client, job, checked.data)
    console.print()
    console.print(f"Go on: sage chat --backend finetune --finetune-model {job.sage.name}", soft_wrap=True)
