"""sage finetune merge."""

from __future__ import annotations

import time
from typing import Literal

import typer

from sage_cli import locate, render
from sage_cli.client import Client
from sage_cli.jobs import outcome
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import ServiceUnavailableError, TrainingFailedError
from sage_contracts.models import MergeJob, MergeRequest, MergeStatus

_POLL_S = 0.5


def merge_command(name: str, *, dtype: Literal["auto", "fp32", "fp16", "bf16"], timeout_s: float) -> None:
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        merge = client.merge(name, MergeRequest(dtype=dtype))
        try:
            with console.status(f"Merging {merge.model}"):
                merge = _await(client, merge, timeout_s)
        except KeyboardInterrupt:
            typer.echo(f"\nDetached: the merge of {merge.model} ({merge.id}) goes on without you.")
            raise typer.Exit(130) from None
    if merge.status is MergeStatus.FAILED:
        raise TrainingFailedError(
            f"The merge of {merge.model} failed: {merge.error or 'no reason was recorded'}"
        )
    render.line(console, "ok", f"Merged {merge.model}")
    outcome.facts(console, [("files", _where(merge))])


def _where(merge: MergeJob) -> str:
    """The folder as people know it: the newest version's is also found under the model's name."""
    path = locate.home_root() / (merge.merged_path or "")
    if not merge.merged_path or not path.is_dir():
        return f"{merge.merged_path}/ (in the stack's SAGE_HOME)"
    newest = locate.home_root() / "finetune_output" / merge.model.partition("@")[0] / path.name
    return f"{newest if newest.exists() and newest.samefile(path) else path}/"


def _await(client: Client, merge: MergeJob, timeout_s: float) -> MergeJob:
    console = render.output()
    deadline = time.monotonic() + timeout_s
    phase: str | None = None
    while not merge.status.is_terminal:
        current = merge.phase or merge.status.value
        if current != phase:
            phase = current
            render.line(console, "wait", phase)
        if time.monotonic() > deadline:
            raise ServiceUnavailableError(
                f"The merge {merge.id} is still {merge.status.value} after {timeout_s:.0f} s; it goes on."
                " `sage status` shows whether a merger runs."
            )
        time.sleep(_POLL_S)
        merge = client.merge_job(merge.id)
    return merge
