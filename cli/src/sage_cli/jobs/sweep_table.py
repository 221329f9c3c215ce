"""A sweep on the screen: a table that fills with losses, or a line for each change in a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from sage_cli import render
from sage_contracts.jobs import JobStatus
from sage_contracts.sweeps import Sweep, SweepChild, point_text, value_text

_STYLES = {
    JobStatus.SUCCEEDED: "green",
    JobStatus.FAILED: "red",
    JobStatus.CANCELLED: "dim",
    JobStatus.RUNNING: "cyan",
}


def print_table(console: Console, sweep: Sweep) -> None:
    """The table as it is now; in a pipe nothing is shortened."""
    if console.is_terminal:
        console.print(table_of(sweep, console.width))
    else:
        render.table(console, _headers(sweep), [_cells(sweep, child) for child in sweep.children])


def table_of(sweep: Sweep, width: int) -> RenderableType:
    """A row a job: its point of the grid, its state, its losses; the best one is marked."""
    rows = []
    for child in sweep.children:
        style = "bold green" if child.job_id == sweep.best_job_id else _STYLES.get(child.status, "")
        rows.append([Text(cell, style=style) for cell in _cells(sweep, child)])
    return render.grid(_headers(sweep), rows, width)


def base_loss(sweep: Sweep) -> float | None:
    """The held-out loss before training: the same for all jobs."""
    known = (child.base_eval_loss for child in sweep.children)
    return next((loss for loss in known if loss is not None), None)


def view_for(console: Console) -> LiveTable | ChangedLines:
    """The view that fits this output."""
    return (
        LiveTable(console) if console.is_terminal and not console.is_dumb_terminal else ChangedLines(console)
    )


class LiveTable:
    """Redrawn in place; the last state stays on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, sweep: Sweep) -> None:
        self._live.update(table_of(sweep, self._console.width))


class ChangedLines:
    """A line when a job starts and when it ends, the table at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, JobStatus] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, sweep: Sweep) -> None:
        for child in sweep.children:
            if child.status is not self._shown.get(child.job_id, JobStatus.QUEUED):
                self._shown[child.job_id] = child.status
                self._console.print(
                    f"{child.name}  {point_text(child.point)}  {_end_text(child)}", soft_wrap=True
                )
        if sweep.status.is_terminal:
            print_table(self._console, sweep)


def _headers(sweep: Sweep) -> list[str]:
    return ["JOB", *sweep.grid, "STATE", "STEP", "LOSS", "HELD-OUT", ""]


def _cells(sweep: Sweep, child: SweepChild) -> list[str]:
    step = "" if child.step is None else f"{child.step}/{child.total_steps or '?'}"
    is_best = child.job_id == sweep.best_job_id
    return [
        child.name,
        *(value_text(child.point[name]) for name in sweep.grid),
        child.status.value,
        step,
        _loss_text(child.loss),
        _loss_text(child.eval_loss),
        "best" if is_best else child.error.message.splitlines()[0] if child.error else "",
    ]


def _loss_text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _end_text(child: SweepChild) -> str:
    match child.status:
        case JobStatus.SUCCEEDED if child.eval_loss is not None:
            return f"succeeded  held-out loss {child.eval_loss:.3f}"
        case JobStatus.FAILED if child.error is not None:
            return f"failed  {child.error.message.splitlines()[0]}"
        case status:
            return status.value
