"""A job on the screen: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sage_cli import render
from sage_contracts.jobs import EventLevel, FineTuningJob, JobEvent, JobMetrics, JobStatus

_WIDE = 72
_PLAIN_EVERY_S = 5.0
_PLAIN_SHARE = 0.1

TRAINING = "training"
"""The trainer's phase in which steps are made."""
# The others, for people; what is not here is shown as it is.
_PHASES = {
    "start": "starting",
    "data": "preparing the data",
    "base_model": "getting the base model",
    "loading": "loading the base model",
    "base_eval": "measuring the base model",
    "eval": "measuring the tuned model",
    "saving": "saving the weights",
    "version": "writing the version",
    "done": "finishing",
}


def view_for(console: Console) -> LiveView | PlainView:
    """The view that fits this output."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView(console)


class PlainView:
    """Lines only: every message, and a line of figures now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_step = 0
        self._shown_at = 0.0
        self._shown_status: JobStatus | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def event(self, event: JobEvent) -> None:
        if event.type == "message":
            _event_line(self._console, event)

    def progress(self, job: FineTuningJob) -> None:
        if job.status is not self._shown_status:
            self._shown_status = job.status
            if job.status is JobStatus.QUEUED:
                render.line(self._console, "wait", "Queued: waiting for a trainer")
        metrics = job.sage.metrics
        step, total = metrics.step or 0, metrics.total_steps or 0
        is_due = (
            step - self._shown_step >= _PLAIN_SHARE * total
            or time.monotonic() - self._shown_at > _PLAIN_EVERY_S
        )
        if step > self._shown_step and (is_due or step == total):
            self._shown_step, self._shown_at = step, time.monotonic()
            render.line(self._console, "wait", f"step {step}/{total or '?'}  {'  '.join(figures(metrics))}")


class LiveView:
    """One bar at the bottom; messages scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        is_wide = console.width >= _WIDE
        columns: list[ProgressColumn] = [
            SpinnerColumn("dots" if render.can_show("⠋", console) else "line"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None if is_wide else 8),
            _Figures(is_wide=is_wide),
        ]
        self._bar = Progress(*columns, console=console, transient=True, expand=is_wide)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def event(self, event: JobEvent) -> None:
        if event.type == "message":
            _event_line(self._bar.console, event)

    def progress(self, job: FineTuningJob) -> None:
        metrics = job.sage.metrics
        if self._task is None:
            self._task = self._bar.add_task("", total=None)
        is_training = job.status is JobStatus.RUNNING and metrics.phase == TRAINING
        is_stepping = is_training and metrics.step is not None and metrics.total_steps
        text = f"step {metrics.step}/{metrics.total_steps}" if is_stepping else phase_text(job)
        self._bar.update(
            self._task,
            description=escape(text),
            total=metrics.total_steps if is_stepping else None,
            completed=metrics.step if is_stepping else 0,
            metrics=metrics if is_stepping else None,
        )


class _Figures(ProgressColumn):
    """Loss, speed and time left; on a narrow terminal without the speed."""

    def __init__(self, *, is_wide: bool) -> None:
        super().__init__(Column(no_wrap=True))
        self._is_wide = is_wide

    def render(self, task: Task) -> Text:
        metrics = task.fields.get("metrics")
        if not isinstance(metrics, JobMetrics):
            return Text()
        shown = [text for text in figures(metrics) if self._is_wide or not text.endswith("tok/s")]
        return Text(" · ".join(shown), style="cyan")


def figures(metrics: JobMetrics) -> list[str]:
    """`loss 1.93`, `812 tok/s`, `ETA 0:42`: what is known."""
    found = []
    if metrics.loss is not None:
        found.append(f"loss {metrics.loss:.3f}")
    if metrics.tokens_per_second is not None:
        found.append(f"{metrics.tokens_per_second:.0f} tok/s")
    if metrics.eta_s is not None:
        found.append(f"ETA {render.seconds_text(metrics.eta_s)}")
    return found


def phase_text(job: FineTuningJob) -> str:
    """What the job is doing, in a few words."""
    match job.status:
        case JobStatus.VALIDATING_FILES:
            return "checking the data"
        case JobStatus.QUEUED:
            return "queued: waiting for a trainer"
        case JobStatus.RUNNING:
            phase = job.sage.metrics.phase or "start"
            return _PHASES.get(phase, phase.replace("_", " "))
        case _:
            return job.status.value


def _event_line(console: Console, event: JobEvent) -> None:
    state = {EventLevel.INFO: "wait", EventLevel.WARN: "warn", EventLevel.ERROR: "bad"}[event.level]
    render.line(console, state, Text(event.message))
