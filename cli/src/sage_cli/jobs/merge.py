"""sage finetune merge, and export."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import typer
from pydantic import ValidationError

from sage_cli import locate, render
from sage_cli.client import Client
from sage_cli.jobs import outcome
from sage_cli.jobs.follow import patiently
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import InvalidRequestError, SageError, ServiceUnavailableError, TrainingFailedError
from sage_contracts.models import (
    ExportContent,
    ExportFormat,
    MergeJob,
    MergeRequest,
    MergeStatus,
    WeightsDtype,
)

_POLL_S = 0.5


def merge_command(name: str, *, dtype: WeightsDtype, timeout_s: float) -> None:
    merge = _carry_out(name, MergeRequest(dtype=dtype), timeout_s, doing="Merging")
    console = render.output()
    render.line(console, "ok", f"Merged {merge.model}")
    outcome.facts(console, [("files", _where(merge)), *_found(merge.report)])


def export_command(
    name: str,
    *,
    format_name: ExportFormat,
    content: ExportContent,
    dtype: WeightsDtype,
    repo: str | None,
    allow_public: bool,
    timeout_s: float,
) -> None:
    if format_name == "hub" and repo is None:
        raise InvalidRequestError("--format hub needs a repository: --repo owner/name.", param="repo")
    try:
        request = MergeRequest(
            dtype=dtype, format=format_name, content=content, repo=repo, allow_public=allow_public
        )
    except ValidationError as error:
        raise InvalidRequestError(
            str(error.errors()[0]["msg"]).removeprefix("Value error, ") + "."
        ) from error
    merge = _carry_out(name, request, timeout_s, doing="Exporting")
    console = render.output()
    render.line(console, "ok", f"Exported {merge.model} as {merge.format}")
    path = locate.home_root() / (merge.result_path or "")
    where = str(path) if path.exists() else f"{merge.result_path} (in the stack's SAGE_HOME)"
    rows = [("address", str(merge.report["url"]))] if "url" in merge.report else [("files", where)]
    folder = path if path.is_dir() else path.parent
    if (folder / "Modelfile").is_file():
        modelfile = shlex.quote(str(folder / "Modelfile"))
        rows.append(("Ollama", f"ollama create {merge.model.partition('@')[0]} -f {modelfile}"))
    rows += [("note", str(note)) for note in merge.report.get("notes", [])]
    outcome.facts(console, [*rows, *_found(merge.report)])


def _carry_out(name: str, request: MergeRequest, timeout_s: float, *, doing: str) -> MergeJob:
    """Ask for it and wait. Raises: TrainingFailedError with the reason when it failed."""
    ensure_stack()
    with Client.from_env() as client:
        merge = client.merge(name, request)
        try:
            with render.output().status(f"{doing} {merge.model}"):
                merge = await_end(client, merge, timeout_s)
        except KeyboardInterrupt:
            typer.echo(f"\nDetached: {doing.lower()} {merge.model} ({merge.id}) goes on without you.")
            raise typer.Exit(130) from None
    if merge.status is MergeStatus.FAILED:
        raise TrainingFailedError(f"{doing} {merge.model} failed: {merge.error or 'no reason was recorded'}")
    return merge


def _found(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured of the result, for people."""
    rows = []
    if size := report.get("size_bytes"):
        rows.append(("size", f"{size / 1e6:,.0f} MB"))
    if parity := report.get("parity"):
        rows.append(
            (
                "checked",
                f"{parity['same']} of {parity['probes']} questions answered in the tuned model's words, "
                f"{parity['top1']:.0%} of the words chosen alike ({parity['dtype']})",
            )
        )
    return rows


def _where(merge: MergeJob) -> str:
    """The folder as people know it: the newest version's is also found under the model's name."""
    path = locate.home_root() / (merge.merged_path or "")
    if not merge.merged_path or not path.is_dir():
        return f"{merge.merged_path}/ (in the stack's SAGE_HOME)"
    newest = locate.home_root() / "finetune_output" / merge.model.partition("@")[0] / path.name
    return f"{newest if newest.exists() and newest.samefile(path) else path}/"


def await_end(
    client: Client,
    merge: MergeJob,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> MergeJob:
    """The merge once it has ended, however often the stack is restarted meanwhile.

    Raises: ServiceUnavailableError when that takes too long, or nobody answers any more.
    """
    console = render.output()
    deadline = clock() + timeout_s
    phase: str | None = None
    while not merge.status.is_terminal:
        current = merge.phase or merge.status.value
        if current != phase:
            phase = current
            render.line(console, "wait", phase)
        if clock() > deadline:
            raise ServiceUnavailableError(
                f"The merge {merge.id} is still {merge.status.value} after {timeout_s:.0f} s; it goes on."
                " `sage status` shows whether a merger runs."
            )
        pause(_POLL_S)
        try:
            merge = patiently(partial(client.merge_job, merge.id), clock=clock, pause=pause)
        except SageError as error:
            if not error.retryable:
                raise
            raise ServiceUnavailableError(
                f"{error.message} The merge {merge.id} goes on once the stack runs: the same command then"
                f" waits for it again, and GET /v1/sage/merges/{merge.id} tells how it ended."
            ) from error
    return merge
