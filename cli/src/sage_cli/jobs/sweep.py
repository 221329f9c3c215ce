"""sage finetune sweep: start one, show it, follow it, cancel it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import typer
from rich.console import Console
from rich.text import Text

from sage_cli import render
from sage_cli.client import Client
from sage_cli.failures import INTERRUPTED, print_json
from sage_cli.jobs import outcome
from sage_cli.jobs.find import find_sweep
from sage_cli.jobs.follow import Pace, patiently
from sage_cli.jobs.grid import check_grid, parse_grid, without_grid
from sage_cli.jobs.submit import CheckedWish, check, queued_anyway, uploaded
from sage_cli.jobs.sweep_table import base_loss, print_table, view_for
from sage_cli.jobs.wish import JobWish
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import TrainingFailedError
from sage_contracts.jobs import JobStatus
from sage_contracts.sweeps import CreateSweepRequest, Grid, Sweep, SweepChild, SweepStatus, point_text


def start_command(
    wish: JobWish, grid: Sequence[str], *, max_jobs: int, is_auto: bool, is_watching: bool
) -> None:
    checked, values = check(wish), parse_grid(grid)
    check_grid(values, wish.settings, checked.options.name, max_jobs=max_jobs)
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        if is_auto:
            checked = checked.sized_for(client)
        checked = checked.with_config(without_grid(checked.options.config, values, wish.settings))
        sweep = submit_sweep(client, checked, values, max_jobs)
        with _detaching(sweep.id):
            _show_choices(console, client, sweep, checked)
        if not is_watching:
            typer.echo(f"Queued. Follow it with: sage finetune sweep watch {sweep.id}")
            return
        _watch(console, client, sweep)


def show_command(given: str, *, as_json: bool) -> None:
    with Client.from_env() as client:
        sweep = find_sweep(client, given)
    if as_json:
        print_json(sweep.model_dump(mode="json"))
        return
    console = render.output()
    console.print(Text(f"{sweep.id}  {sweep.name}  {sweep.status.value}", style="bold"))
    print_table(console, sweep)
    _show_result(console, sweep)


def watch_command(given: str) -> None:
    with Client.from_env() as client:
        _watch(render.output(), client, find_sweep(client, given))


def cancel_command(given: str) -> None:
    with Client.from_env() as client:
        sweep = client.cancel_sweep(find_sweep(client, given).id)
    if sweep.status.is_terminal:
        typer.echo(f"{sweep.id} is cancelled.")
    else:
        typer.echo(f"{sweep.id}: what waited is cancelled; the running job ends when its trainer has heard.")


def submit_sweep(client: Client, wish: CheckedWish, grid: Grid, max_jobs: int) -> Sweep:
    """Upload the data and queue the jobs. Raises: as `submit`."""
    with uploaded(client, wish) as file_id:
        request = CreateSweepRequest(
            model=wish.model, training_file=file_id, sage=wish.options, grid=grid, max_jobs=max_jobs
        )
        try:
            return client.create_sweep(request)
        except KeyboardInterrupt:
            sweep_id = _queued_anyway(client, wish, file_id)
            raise (_detached(sweep_id) if sweep_id else outcome.nothing_queued()) from None


def _queued_anyway(client: Client, wish: CheckedWish, file_id: str | None) -> str | None:
    """The sweep that the server made of a request whose answer was not waited for."""
    if file_id is not None:
        job = queued_anyway(client, wish, file_id)
        return (job.metadata or {}).get("sweep") if job else None
    name = wish.options.name or wish.task.value
    newest = client.sweeps(1)
    return next((sweep.id for sweep in newest if sweep.name == name and not sweep.status.is_terminal), None)


@contextmanager
def _detaching(sweep_id: str) -> Iterator[None]:
    """Ctrl-C leaves the block and not the sweep. Raises: typer.Exit then."""
    try:
        yield
    except KeyboardInterrupt:
        raise _detached(sweep_id) from None


def _detached(sweep_id: str) -> typer.Exit:
    typer.echo(
        f"\nDetached: the sweep goes on without you.\n"
        f"  come back  sage finetune sweep watch {sweep_id}\n"
        f"  stop it    sage finetune sweep cancel {sweep_id}"
    )
    return typer.Exit(INTERRUPTED)


def _show_choices(console: Console, client: Client, sweep: Sweep, wish: CheckedWish) -> None:
    job = client.job(sweep.children[0].job_id)
    data = str(wish.data) if wish.data else outcome.own_data_text(sweep.task.value, job.sage.config.method)
    console.print(
        Text(f"Sweep {sweep.name!r} ({sweep.task.value}): {len(sweep.children)} jobs", style="bold")
    )
    preset = job.sage.preset.value if job.sage.preset else "none"
    outcome.facts(
        console, [("sweep", sweep.id), ("base model", sweep.model), ("data", data), ("preset", preset)]
    )


def _watch(console: Console, client: Client, sweep: Sweep) -> None:
    """Raises: TrainingFailedError when no job came to a model, or all that is left is paused; typer.Exit when
    detached."""
    pace = Pace()
    before: list[JobStatus] = []
    with _detaching(sweep.id), view_for(console) as view:
        while True:
            view.show(sweep)
            if sweep.status.is_terminal or _waits_for(sweep):
                break
            states = [child.status for child in sweep.children]
            pace.wait(has_news=states != before)
            before = states
            sweep = patiently(partial(client.sweep, sweep.id))
    _show_result(console, sweep)
    if paused := _waits_for(sweep):
        reason = next((f": {child.error.message}" for child in paused if child.error), ".")
        resume = "\n".join(f"  go on   sage finetune resume {child.name}" for child in paused)
        raise TrainingFailedError(
            f"The sweep {sweep.id} waits for what is paused{reason}\n"
            f"{resume}\n  end it  sage finetune sweep cancel {sweep.id}"
        )
    if sweep.status is not SweepStatus.SUCCEEDED:
        first = next((child for child in sweep.children if child.error), None)
        reason = f": {first.error.message}" if first and first.error else "."
        raise TrainingFailedError(
            f"The sweep {sweep.id} {'was ' if sweep.status is SweepStatus.CANCELLED else ''}"
            f"{sweep.status.value}{reason}\nEach job has its own log: sage finetune logs {sweep.name}-s1"
        )


def _waits_for(sweep: Sweep) -> list[SweepChild]:
    """Its paused jobs, where no other is left that could go on by itself."""
    left = [child for child in sweep.children if not child.status.is_terminal]
    return left if all(child.status is JobStatus.PAUSED for child in left) else []


def _show_result(console: Console, sweep: Sweep) -> None:
    best = next((child for child in sweep.children if child.job_id == sweep.best_job_id), None)
    if best is None:
        if sweep.status is SweepStatus.SUCCEEDED:
            console.print("No held-out loss is known, so none of them is called the best.", soft_wrap=True)
        return
    console.print(
        f"Best{'' if sweep.status.is_terminal else ' so far'}: {best.name}  {point_text(best.point)}",
        soft_wrap=True,
    )
    base = base_loss(sweep)
    if base is not None and best.eval_loss is not None:
        console.print(f"Held-out loss: {outcome.loss_text(base, best.eval_loss)}", soft_wrap=True)
    if sweep.fine_tuned_model:
        console.print(
            f"{sweep.name!r} is now {sweep.fine_tuned_model}, the same model as {best.fine_tuned_model}.\n"
            f"Chat with it: sage chat --backend finetune --finetune-model {sweep.name}",
            soft_wrap=True,
        )
