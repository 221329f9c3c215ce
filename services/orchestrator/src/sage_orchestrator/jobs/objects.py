"""Rows as OpenAI's objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_contracts.config import PresetName
from sage_contracts.jobs import (
    CheckpointInfo,
    CheckpointMetrics,
    EventLevel,
    FineTuningJob,
    JobCheckpoint,
    JobError,
    JobEvent,
    JobMetrics,
    JobStatus,
    SageJobInfo,
)
from sage_contracts.models import checkpoint_name
from sage_orchestrator.jobs.stored import read_settings, read_task
from sage_orchestrator.rows import CheckpointRow, EventRow, JobRow


def to_job(row: JobRow, now: float) -> FineTuningJob:
    metrics = JobMetrics.model_validate(row.metrics)
    status = JobStatus(row.status)
    settings = read_settings(row)
    config = settings.config
    if status is not JobStatus.RUNNING:
        # The last estimate of an attempt that is over.
        metrics.eta_s = None
    ends_at = None if metrics.eta_s is None else int(now + metrics.eta_s)
    return FineTuningJob(
        id=row.id,
        created_at=int(row.created_at),
        finished_at=None if row.finished_at is None else int(row.finished_at),
        estimated_finish=ends_at,
        model=row.model,
        fine_tuned_model=row.fine_tuned_model,
        status=status,
        # The field is a plain string to OpenAI's clients: data that we bring along gets a name of its own.
        training_file=row.training_file or f"builtin:{row.task if config.method == 'sft' else 'preferences'}",
        validation_file=row.validation_file,
        result_files=[row.result_file] if row.result_file else [],
        hyperparameters=settings.hyperparameters,
        method=settings.method,
        trained_tokens=metrics.trained_tokens if status is JobStatus.SUCCEEDED else None,
        error=None if row.error is None else JobError.model_validate(row.error),
        seed=config.seed,
        metadata=row.labels,
        integrations=row.integrations,
        sage=SageJobInfo(
            name=row.name,
            task=read_task(row.task),
            preset=None if row.preset is None else PresetName(row.preset),
            config=config,
            unreadable=settings.fault,
            attempt=row.attempt,
            version=row.version,
            output_dir=config.output_dir,
            metrics=metrics,
            worker_id=row.worker_id,
        ),
    )


def to_event(row: EventRow) -> JobEvent:
    return JobEvent(
        id=row.id,
        created_at=int(row.created_at),
        level=EventLevel(row.level),
        message=row.message,
        type="metrics" if row.type == "metrics" else "message",
        data=row.data,
    )


def to_checkpoint(
    row: CheckpointRow, job: JobRow, figures: Mapping[str, Any], *, is_kept: bool
) -> JobCheckpoint:
    """`figures` are those of its step's events, under the names that these have for them."""
    return JobCheckpoint(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=checkpoint_name(f"{job.name}@{job.version}", row.step),
        step_number=row.step,
        metrics=CheckpointMetrics(
            step=row.step,
            train_loss=figures.get("train_loss") if row.train_loss is None else row.train_loss,
            train_mean_token_accuracy=figures.get("train_mean_token_accuracy"),
            full_valid_loss=figures.get("full_valid_loss") if row.eval_loss is None else row.eval_loss,
            full_valid_mean_token_accuracy=figures.get("full_valid_mean_token_accuracy"),
        ),
        sage=CheckpointInfo(is_servable=is_kept and job.status == JobStatus.SUCCEEDED.value),
    )
