"""sage finetune sweep: start one, show it, follow it, cancel it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from sage_cli import render
from sage_cli.client import Client
from sage_cli.failures import INTERRUPTED, print_json
from sage_cli.jobs import outcome
from sage_cli.jobs.follow import POLL_S, patiently
from sage_cli.jobs.settings_file import value_of
from sage_cli.jobs.submit import CheckedWish, JobWish, check, uploaded
from sage_cli.jobs.sweep_table import base_loss, print_table, view_for
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import InvalidRequestError, NotFoundError, TrainingFailedError
from sage_contracts.sweeps import CreateSweepRequest, Grid, Sweep, SweepStatus, grid_points, point_text


def start_command(
    wish: JobWish, grid: Sequence[str], *, max_jobs: int, is_auto: bool, is_watching: bool
) -> None:
    checked, values = check(wish), parse_grid(grid)
    grid_points(values, max_jobs=max_jobs)
    ensure_stack()
    console = render.output()
    with Client.from_env() as client:
        if is_auto:
            checked = _without(checked.sized_for(client), values)
        sweep = _submit(client, checked, values, max_jobs)
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


def parse_grid(given: Sequence[str]) -> Grid:
    """`learning_rate=1e-4,2e-4` and so on. Raises: InvalidRequestError."""
    grid: Grid = {}
    for entry in given:
        name, equals, text = (part.strip() for part in entry.partition("="))
        if not equals or not name or not text:
            raise InvalidRequestError(
                f"--grid {entry!r}: write it as KEY=V1,V2, for example --grid learning_rate=1e-4,2e-4."
            )
        if name in grid:
            raise InvalidRequestError(f"--grid {name} is given twice: put all its values into one.")
        grid[name] = _values(text)
    if not grid:
        raise InvalidRequestError(
            "A sweep needs a grid: --grid learning_rate=1e-4,2e-4 --grid lora.r=4,8. "
            "To train once: sage finetune start."
        )
    return grid


def find_sweep(client: Client, given: str) -> Sweep:
    """By its id, or the newest of a name. Raises: NotFoundError naming those there are."""
    if given.startswith("sweep-"):
        return client.sweep(given)
    sweeps = client.sweeps()
    for sweep in sweeps:  # newest first
        if sweep.name == given:
            return sweep
    names = ", ".join(dict.fromkeys(sweep.name for sweep in sweeps))
    raise NotFoundError(
        f"There is no sweep of {given!r}. " + (f"There are: {names}." if names else "There are none yet.")
    )


def _values(text: str) -> list[Any]:
    try:
        # Values that are lists themselves have commas of their own.
        found = json.loads(f"[{text}]")
    except ValueError:
        return [value_of(part.strip()) for part in text.split(",")]
    return list(found)


def _without(checked: CheckedWish, grid: Grid) -> CheckedWish:
    """A size of the quick start gives way to the grid's values of it."""
    # Steps would win over the epochs that are to be compared.
    said = {*grid, *(["max_steps"] if "num_train_epochs" in grid else [])}
    config = {name: value for name, value in checked.options.config.items() if name not in said}
    return checked.with_config(config)


def _submit(client: Client, wish: CheckedWish, grid: Grid, max_jobs: int) -> Sweep:
    with uploaded(client, wish) as file_id:
        return client.create_sweep(
            CreateSweepRequest(
                model=wish.model, training_file=file_id, sage=wish.options, grid=grid, max_jobs=max_jobs
            )
        )


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
    """Raises: TrainingFailedError when no job came to a model; typer.Exit when detached."""
    try:
        with view_for(console) as view:
            while True:
                view.show(sweep)
                if sweep.status.is_terminal:
                    break
                time.sleep(POLL_S)
                sweep = patiently(partial(client.sweep, sweep.id))
    except KeyboardInterrupt:
        typer.echo(
            f"\nDetached: the sweep goes on without you.\n"
            f"  come back  sage finetune sweep watch {sweep.id}\n"
            f"  stop it    sage finetune sweep cancel {sweep.id}"
        )
        raise typer.Exit(INTERRUPTED) from None
    _show_result(console, sweep)
    if sweep.status is not SweepStatus.SUCCEEDED:
        first = next((child for child in sweep.children if child.error), None)
        reason = f": {first.error.message}" if first and first.error else "."
        raise TrainingFailedError(
            f"The sweep {sweep.id} {'was ' if sweep.status is SweepStatus.CANCELLED else ''}"
            f"{sweep.status.value}{reason}\nEach job has its own log: sage finetune logs {sweep.name}-s1"
        )


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
