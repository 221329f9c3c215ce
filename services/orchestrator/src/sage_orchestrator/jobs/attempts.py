"""What workers do with a job: claim it, report on it, finish it. The attempt number is the fencing token."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from sage_contracts.config import TrainingConfig
from sage_contracts.errors import (
    InvalidRequestError,
    NotYoursError,
    SageError,
    StorageFullError,
    TrainingFailedError,
)
from sage_contracts.home import Home
from sage_contracts.jobs import EventLevel, FineTuningJob, JobMetrics, JobStatus
from sage_contracts.workers import (
    ClaimRequest,
    EventReport,
    Finish,
    Order,
    Outcome,
    Report,
    ReportReply,
    TrainClaim,
)
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.devices import ledger
from sage_orchestrator.devices import repository as devices
from sage_orchestrator.files import repository as files
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.jobs.objects import to_job
from sage_orchestrator.jobs.results import FILENAME, add_results, step_metrics_csv
from sage_orchestrator.jobs.stored import read_settings
from sage_orchestrator.leases import ended_values, is_claimed_by, queued_values
from sage_orchestrator.models import repository as models
from sage_orchestrator.models.registry import register_version, versions_on_disk
from sage_orchestrator.rows import JobRow

logger = logging.getLogger(__name__)

_TARGETS = {
    Outcome.SUCCEEDED: JobStatus.SUCCEEDED,
    Outcome.FAILED: JobStatus.FAILED,
    Outcome.CANCELLED: JobStatus.CANCELLED,
    Outcome.PAUSED: JobStatus.PAUSED,
    Outcome.SUSPENDED: JobStatus.PAUSED,
    Outcome.RELEASED: JobStatus.QUEUED,
}


def target_of(outcome: Outcome, order: Order) -> JobStatus:
    """Where a job goes when its attempt ends, given what its owner wants by now."""
    if outcome is Outcome.SUCCEEDED:
        return JobStatus.SUCCEEDED
    if order is Order.CANCEL:
        # However the worker stopped, its owner wanted it stopped.
        return JobStatus.CANCELLED
    if outcome is Outcome.PAUSED and order is Order.CONTINUE:
        # Resumed while the worker was still stopping.
        return JobStatus.QUEUED
    if outcome is Outcome.RELEASED and order is Order.PAUSE:
        return JobStatus.PAUSED
    return _TARGETS[outcome]


def _is_heard(outcome: Outcome, status: JobStatus) -> bool:
    """Whether a job stands where this end of its newest attempt has led it, or has ended for good.

    Elsewhere, as in the queue to which a lost worker's job is taken back, this end was never heard.
    """
    return status.is_terminal or status in {target_of(outcome, order) for order in Order}


@dataclass(frozen=True)
class AttemptService:
    database: Database
    home: Home
    clock: Clock
    lease_s: float
    wake: Callable[[], None]

    def claim(self, job_id: str, request: ClaimRequest) -> TrainClaim:
        """Take a queued job: lease, next attempt number, the device, and at the first time its version.

        Raises: NotYoursError when it is not there to be taken; DeviceBusyError when its device is not.
        """
        with self.database.read() as session:
            name = jobs.get(session, job_id).name
        first_free = versions_on_disk(self.home, name) + 1
        with self.database.write() as session:
            answer = self._claim(session, job_id, request, first_free)
        if isinstance(answer, SageError):
            raise answer
        return answer

    def _claim(
        self, session: Session, job_id: str, request: ClaimRequest, first_free: int
    ) -> TrainClaim | SageError:
        now = self.clock()
        # Of two jobs that write the same folder one is claimed, the other waits.
        row = jobs.lock_with_name(session, job_id)
        if is_claimed_by(row, request):
            return self._train_claim(session, row)
        if row.status != JobStatus.QUEUED.value:
            return NotYoursError(f"{job_id} is {row.status}, not queued.")
        if fault := read_settings(row).fault:
            return self._give_up(session, row, fault, now)
        if jobs.is_name_running(session, row.name, besides=job_id):
            self._say_waiting(session, row, f"waiting: another job named {row.name} is running", now)
            return NotYoursError(f"Another job named {row.name} is running; {job_id} stays in the queue.")
        refusal = ledger.take(session, self._ask(row, request), now=now, expires_at=now + self.lease_s)
        if refusal is not None:
            self._say_waiting(session, row, refusal.message, now)
            return refusal
        version = row.version or models.reserve_version(session, row.name, at_least=first_free)
        attempt = row.attempt + 1
        values = {
            "attempt": attempt,
            "version": version,
            "worker_id": request.worker_id,
            "claim_id": request.claim_id,
            "lease_expires_at": now + self.lease_s,
            "pending_order": Order.CONTINUE.value,
            "waiting_for": None,
            "ring_at": None,
            "events_heard": None,
        }
        source = [JobStatus.QUEUED]
        if not jobs.transition(
            session, job_id, JobStatus.RUNNING, values, sources=source, attempt=attempt - 1
        ):
            raise NotYoursError(f"{job_id} was claimed by another worker.")
        again = f" (attempt {attempt}, from the last checkpoint if there is one)" if attempt > 1 else ""
        jobs.add_event(session, job_id, now, f"Started on {request.worker_id}, {request.device}{again}")
        return self._train_claim(session, jobs.get(session, job_id))

    def report(self, job_id: str, report: Report) -> ReportReply:
        """News of the newest attempt; renews its lease. Raises: NotYoursError."""
        now = self.clock()
        with self.database.write() as session:
            row = jobs.get(session, job_id, lock=True)
            self._require_current(row, report.attempt, report.worker_id)
            expires_at = now + self.lease_s
            values: dict[str, Any] = {"lease_expires_at": expires_at}
            if report.metrics is not None:
                values["metrics"] = _merged(row.metrics, report.metrics)
            if jobs.is_further(session, job_id, report.checkpoints):
                # Lost workers are counted so that a job which kills them ends, and this one gets on.
                values["lost_attempts"] = 0
            order = jobs.order_of(row)
            news = _not_heard(report.events, row.events_heard or 0)
            heard = max((event.seq for event in news if event.seq is not None), default=row.events_heard)
            values["events_heard"] = heard
            if not jobs.change(session, job_id, values, attempt=report.attempt):
                raise NotYoursError(f"{job_id} was taken from attempt {report.attempt}.")
            devices.renew(session, ledger.training_holder(job_id), expires_at)
            jobs.add_events(session, job_id, news)
            jobs.add_checkpoints(session, job_id, now, report.checkpoints)
        return ReportReply(order=order, lease_s=self.lease_s)

    def finish(self, job_id: str, finish: Finish) -> FineTuningJob:
        """The end of an attempt; said twice it counts once.

        Raises: NotYoursError; InvalidRequestError for a success without an adapter.
        """
        now = self.clock()
        steps = self._steps(job_id, finish)
        with self.database.write() as session:
            row = jobs.lock_with_name(session, job_id)
            if row.attempt == finish.attempt and _is_heard(finish.outcome, JobStatus(row.status)):
                # The reply to the first time was lost on its way.
                return to_job(row, now)
            self._require_current(row, finish.attempt, finish.worker_id)
            target = target_of(finish.outcome, jobs.order_of(row))
            values = self._values_of(row, finish, target, now)
            name = row.name
            if target is JobStatus.SUCCEEDED:
                metrics = JobMetrics.model_validate(values.get("metrics", row.metrics))
                register_version(session, row, finish, metrics, now)
                values["result_file"] = self._add_results(session, job_id, steps, now)
            if not jobs.transition(
                session, job_id, target, values, sources=[JobStatus.RUNNING], attempt=finish.attempt
            ):
                raise NotYoursError(f"{job_id} was taken from attempt {finish.attempt}.")
            ledger.release(session, ledger.training_holder(job_id), now)
            jobs.wake_same_name(session, name, now)
            message, level = _last_event(finish, target, values)
            jobs.add_event(session, job_id, now, message, level=level)
            job = to_job(jobs.get(session, job_id), now)
        self.wake()
        return job

    def _steps(self, job_id: str, finish: Finish) -> str:
        """The result file of a success that is now told; "" for all else.

        Not read where the end is written: of a long run it takes a second, in which nobody else could write.
        """
        with self.database.read() as session:
            row = jobs.get(session, job_id)
            is_told_now = row.status == JobStatus.RUNNING.value and row.attempt == finish.attempt
            if finish.outcome is not Outcome.SUCCEEDED or not is_told_now:
                return ""
            metrics = JobMetrics.model_validate(_merged(row.metrics, finish.metrics or JobMetrics()))
            return step_metrics_csv(jobs.event_data(session, job_id), metrics)

    def _add_results(self, session: Session, job_id: str, steps: str, now: float) -> str | None:
        """The file's id; None where it could not be written. What was trained counts without it."""
        try:
            return add_results(session, self.home, steps, now)
        except (StorageFullError, OSError) as error:
            message = f"The job has no {FILENAME} among its result_files: {error}"
            logger.warning("job %s: %s", job_id, message)
            jobs.add_event(session, job_id, now, message, level=EventLevel.WARN)
            return None

    def _values_of(self, row: JobRow, finish: Finish, target: JobStatus, now: float) -> dict[str, Any]:
        values: dict[str, Any] = {"pending_order": Order.CONTINUE.value}
        if finish.metrics is not None:
            values["metrics"] = _merged(row.metrics, finish.metrics)
        if target.is_terminal:
            values |= ended_values(now)
        elif target is JobStatus.QUEUED:
            values |= queued_values(now)
        else:
            values |= {"lease_expires_at": None, "ring_at": None, "worker_id": None}
        if target is JobStatus.SUCCEEDED:
            is_whole = read_settings(row).config.tuning == "full"
            if not finish.base_model or not (finish.adapter_path or is_whole):
                raise InvalidRequestError(
                    "A success names its base_model, and its adapter_path unless it was tuned in full.",
                    param="adapter_path",
                )
            values["fine_tuned_model"] = f"{row.name}@{row.version}"
        is_suspended = finish.outcome is Outcome.SUSPENDED and target is JobStatus.PAUSED
        if target is JobStatus.FAILED or is_suspended:
            values["error"] = {
                "code": finish.error_code or TrainingFailedError.code,
                "message": finish.error_message or "The worker gave no reason; see its log.",
                "param": finish.error_param,
            }
        return values

    def _ask(self, row: JobRow, request: ClaimRequest) -> ledger.Ask:
        return ledger.Ask(
            holder=ledger.training_holder(row.id),
            purpose="training",
            device=request.device,
            total_bytes=request.device_total_bytes,
            bytes=None,
            label=f"training {row.name}",
            job_id=row.id,
        )

    def _train_claim(self, session: Session, row: JobRow) -> TrainClaim:
        config = TrainingConfig.model_validate(row.config)
        training = files.get(session, row.training_file) if row.training_file else None
        validation = files.get(session, row.validation_file) if row.validation_file else None
        return TrainClaim(
            job_id=row.id,
            attempt=row.attempt,
            lease_s=self.lease_s,
            name=row.name,
            version=row.version or 0,
            config=config,
            training_path=training.path if training else None,
            training_filename=training.filename if training else None,
            validation_path=validation.path if validation else None,
            validation_filename=validation.filename if validation else None,
            output_dir=config.output_dir or self.home.relative(self.home.finetune_output / row.name),
            named_version=models.alias_version(session, row.name),
            told_step=jobs.last_told_step(session, row.id),
            unfinished_jobs=jobs.begun_and_unfinished(session, besides=row.id),
        )

    @staticmethod
    def _give_up(session: Session, row: JobRow, fault: str, now: float) -> NotYoursError:
        """End a job that would be trained otherwise than it was asked for."""
        error = {"code": InvalidRequestError.code, "message": fault, "param": None}
        values = {**ended_values(now), "error": error}
        jobs.transition(session, row.id, JobStatus.FAILED, values, sources=[JobStatus.QUEUED])
        jobs.wake_same_name(session, row.name, now)
        jobs.add_event(session, row.id, now, fault, level=EventLevel.ERROR)
        return NotYoursError(f"{row.id} cannot be trained as it was stored. {fault}")

    @staticmethod
    def _require_current(row: JobRow, attempt: int, worker_id: str) -> None:
        if row.status != JobStatus.RUNNING.value:
            raise NotYoursError(f"{row.id} is {row.status}; attempt {attempt} is over.")
        if row.attempt != attempt or row.worker_id != worker_id:
            raise NotYoursError(
                f"{row.id} is in attempt {row.attempt} on {row.worker_id}; attempt {attempt} is over."
            )

    @staticmethod
    def _say_waiting(session: Session, row: JobRow, message: str, now: float) -> None:
        """Tell people why nothing happens, once per reason however often workers ask."""
        if row.waiting_for != message:
            row.waiting_for = message
            jobs.add_event(session, row.id, now, message)


def _merged(known: dict[str, Any], news: JobMetrics) -> dict[str, Any]:
    """What is not said again stays known: the base's loss is measured once, before the first step."""
    return {**known, **news.model_dump(exclude_none=True)}


def _not_heard(events: list[EventReport], heard: int) -> list[EventReport]:
    """Without those that came before, in a report whose answer was lost."""
    return [event for event in events if event.seq is None or event.seq > heard]


def _last_event(finish: Finish, target: JobStatus, values: dict[str, Any]) -> tuple[str, EventLevel]:
    if target is JobStatus.SUCCEEDED:
        return f"New fine-tuned model created: {values['fine_tuned_model']}", EventLevel.INFO
    if target is JobStatus.FAILED:
        return str(values["error"]["message"]), EventLevel.ERROR
    if target is JobStatus.PAUSED and values.get("error"):
        return f"Paused, to be resumed once this is put right: {values['error']['message']}", EventLevel.ERROR
    if target is JobStatus.QUEUED:
        return (
            "The worker gave the job back; waiting for another, to resume from the last checkpoint",
            EventLevel.WARN,
        )
    return f"Job {target.value}", EventLevel.INFO
