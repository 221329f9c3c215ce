"""What the fake gateway remembers: jobs that follow a script, and the models they leave."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from sage_contracts.config import Task, TrainingConfig, preset_fields
from sage_contracts.errors import ModelNotFoundError, NotFoundError
from sage_contracts.files import FileObject
from sage_contracts.jobs import (
    CreateJobRequest,
    EventLevel,
    FineTuningJob,
    JobError,
    JobEvent,
    JobMetrics,
    JobStatus,
    SageJobInfo,
)
from sage_contracts.models import ExportFormat, ModelCard, ModelInfo
from sage_contracts.sweeps import Sweep

STEPS = 2
MODEL = "smollm2-135m"
FAILURES = {
    "fails": ("training_failed", "The loss became NaN at step 4."),
    "no-hub": ("model_not_found", "No hub is reached."),
    "dies": ("internal_error", "The trainer died."),
}


@dataclass
class FakeJob:
    """A script of looks: queued, preparing, steps, done."""

    job: FineTuningJob
    looks: int = 0
    events: list[JobEvent] = field(default_factory=list)

    def say(self, message: str, *, level: EventLevel = EventLevel.INFO, **data: Any) -> None:
        self.events.append(
            JobEvent(
                id=f"ftevent-{self.job.id}-{len(self.events)}",
                created_at=int(time.time()),
                level=level,
                message=message,
                type="metrics" if data else "message",
                data=data or None,
            )
        )

    def look(self) -> None:
        job, metrics = self.job, self.job.sage.metrics
        if job.status.is_terminal or job.status is JobStatus.PAUSED:
            return
        self.looks += 1
        if self.looks == 2:
            job.status, metrics.phase = JobStatus.RUNNING, "data"
            self.say("Preparing data")
        elif 2 < self.looks <= 2 + STEPS:
            self._step(self.looks - 2)
        elif self.looks > 2 + STEPS and job.sage.name != "endless":
            self._end()

    def _step(self, step: int) -> None:
        metrics = self.job.sage.metrics
        metrics.phase, metrics.step, metrics.total_steps = "training", step, STEPS
        metrics.loss, metrics.tokens_per_second, metrics.eta_s = 2.5 - 0.1 * step, 800.0 + step, 10.0 - step
        self.say(f"Step {step}/{STEPS} loss {metrics.loss:.2f}", step=step, total_steps=STEPS)

    def _end(self) -> None:
        job = self.job
        job.finished_at = int(time.time())
        if job.sage.name in FAILURES:
            code, message = FAILURES[job.sage.name]
            job.status = JobStatus.FAILED
            job.error = JobError(code=code, message=message)
            self.say(message, level=EventLevel.ERROR)
            return
        job.status = JobStatus.SUCCEEDED
        job.fine_tuned_model = f"{job.sage.name}@{job.sage.version}"
        job.sage.metrics.base_eval_loss, job.sage.metrics.eval_loss = 2.391, 1.898
        job.sage.metrics.base_perplexity, job.sage.metrics.perplexity = 10.92, 6.673
        job.sage.metrics.base_token_accuracy, job.sage.metrics.token_accuracy = 0.524, 0.581
        self.say(f"Registered {job.fine_tuned_model}")


@dataclass
class State:
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    files: dict[str, FileObject] = field(default_factory=dict)
    merges: dict[str, int] = field(default_factory=dict)
    formats: dict[str, ExportFormat] = field(default_factory=dict)
    """Of the merges."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    swept: dict[str, str] = field(default_factory=dict)
    """The best job by the name of its sweep."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    counter: Any = field(default_factory=lambda: itertools.count(1))

    def clear(self) -> None:
        for kept in (self.jobs, self.files, self.merges, self.sweeps, self.swept, self.requests):
            kept.clear()
        self.counter = itertools.count(1)

    def job(self, job_id: str) -> FakeJob:
        if job_id not in self.jobs:
            raise NotFoundError(f"There is no job {job_id}: list them with GET /v1/fine_tuning/jobs.")
        return self.jobs[job_id]

    def tuned(self) -> list[FineTuningJob]:
        return [fake.job for fake in self.jobs.values() if fake.job.status is JobStatus.SUCCEEDED]


def make_job(state: State, request: CreateJobRequest) -> FakeJob:
    options = request.sage
    task = options.task or Task.CUSTOM
    if request.model == "nowhere/nothing":
        raise ModelNotFoundError("There is no base model 'nowhere/nothing'.", param="model")
    preset = options.preset or "cpu"
    fields = preset_fields(preset) | options.config | {"model_name": MODEL, "task": task}
    name = options.name or task.value
    versions = [job for job in state.tuned() if job.sage.name == name]
    job = FineTuningJob(
        id=f"ftjob-{next(state.counter):04}",
        created_at=int(time.time()),
        model=MODEL,
        status=JobStatus.QUEUED,
        training_file=request.training_file or f"builtin:{task.value}",
        metadata=request.metadata,
        sage=SageJobInfo(
            name=name,
            task=task,
            preset=preset,
            config=TrainingConfig.model_validate(fields),
            version=len(versions) + 1,
            output_dir=f"finetune_output/{name}",
            metrics=JobMetrics(),
        ),
    )
    state.jobs[job.id] = FakeJob(job)
    return state.jobs[job.id]


def cards(state: State) -> list[ModelCard]:
    found = []
    for job in state.tuned():
        info = ModelInfo(
            name=job.sage.name,
            version=job.sage.version or 1,
            task=job.sage.task,
            base_model=MODEL,
            adapter_path=f"finetune_output/{job.sage.name}/versions/{job.sage.version}/lora_weights",
            base_eval_loss=2.391,
            eval_loss=1.898,
        )
        found.append(ModelCard(id=job.fine_tuned_model or "", created=job.created_at, sage=info))
        alias = info.model_copy(update={"alias_of": job.fine_tuned_model})
        found.append(ModelCard(id=job.sage.name, created=job.created_at, sage=alias))
    for name, job_id in state.swept.items():
        info = ModelInfo(name=name, version=1, job_id=job_id, base_model=MODEL, adapter_path="adapters/best")
        found.append(ModelCard(id=name, created=0, sage=info))
    return [*{card.id: card for card in found}.values(), ModelCard(id="mock", created=0)]
