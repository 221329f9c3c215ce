"""A job's step metrics as the CSV that OpenAI's clients look for in `result_files`.

Source: OpenAI API reference, "Fine-tuning", the columns of a result file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.orm import Session

from sage_contracts.files import FilePurpose
from sage_contracts.home import Home, write_whole
from sage_contracts.jobs import JobMetrics
from sage_orchestrator.ids import new_id
from sage_orchestrator.rows import FileRow

FILENAME = "step_metrics.csv"
# Each column under the names that an event's data may have for it; the first one found counts.
_COLUMNS = {
    "train_loss": ("train_loss",),
    "train_accuracy": ("train_mean_token_accuracy",),
    "valid_loss": ("full_valid_loss", "valid_loss"),
    "valid_mean_token_accuracy": ("full_valid_mean_token_accuracy", "valid_mean_token_accuracy"),
}


def add_results(session: Session, home: Home, steps: str, now: float) -> str:
    """Write the file and its row; the file's id. Raises: StorageFullError."""
    from sage.tools.finetune.storage import storage_errors

    content = steps.encode()
    file_id = new_id("file")
    path = home.files / f"{file_id}.csv"
    with storage_errors(path):
        write_whole(path, content)
    session.add(
        FileRow(
            id=file_id,
            filename=FILENAME,
            purpose=FilePurpose.FINE_TUNE_RESULTS.value,
            size_bytes=len(content),
            path=home.relative(path),
            created_at=now,
        )
    )
    session.flush()
    return file_id


def step_metrics_csv(events: Iterable[Mapping[str, Any]], metrics: JobMetrics) -> str:
    """One row a step, by step; of a step that was repeated after a resume the later figures count.

    `metrics` has the losses before and after the run, for trainers that tell of them nowhere else.
    """
    steps: dict[int, dict[str, Any]] = {}
    for data in events:
        if isinstance(data.get("step"), int):
            found = {
                column: next((data[name] for name in names if data.get(name) is not None), None)
                for column, names in _COLUMNS.items()
            }
            known = steps.setdefault(data["step"], {})
            known.update({column: value for column, value in found.items() if value is not None})
    if metrics.base_eval_loss is not None:
        steps.setdefault(0, {}).setdefault("valid_loss", metrics.base_eval_loss)
    is_measured = any(step and "valid_loss" in figures for step, figures in steps.items())
    if metrics.eval_loss is not None and steps and not is_measured:
        # Where there are measurements, it may be that of an earlier step, which was kept as the best.
        steps[max(steps)].setdefault("valid_loss", metrics.eval_loss)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *_COLUMNS])
    for step, figures in sorted(steps.items()):
        if figures:
            writer.writerow([step, *(_number(figures.get(column)) for column in _COLUMNS)])
    return text.getvalue()


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
