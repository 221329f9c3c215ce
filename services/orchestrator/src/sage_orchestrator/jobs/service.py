"""Fine-tuning jobs as their owners see them: create, look, cancel, pause, resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sqlalchemy.orm import Session

from sage_contracts.errors import (
    ConflictError,
    InvalidDataError,
    InvalidRequestError,
    NotFoundError,
    SageError,
    StorageFullError,
)
from sage_contracts.files import FilePurpose
from sage_contracts.home import Home
from sage_contracts.jobs import (
    CreateJobRequest,
    EventLevel,
    EventType,
    FineTuningJob,
    Hyperparameters,
    JobCheckpoint,
    JobEvent,
    JobStatus,
)
from sage_contracts.paging import ListPage
from sage_contracts.workers import Order
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.devices import ledger
from sage_orchestrator.files import repository as files
from sage_orchestrator.ids import new_id
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.jobs.checking import DataFile, FileChecks
from sage_orchestrator.jobs.checkpoints import is_kept
from sage_orchestrator.jobs.choices import TrainingDevice, choose_model, choose_preset
from sage_orchestrator.jobs.objects import to_checkpoint, to_event, to_job
from sage_orchestrator.jobs.resolve import hyperparameters_of, method_of, name_of, resolve_config, task_of
from sage_orchestrator.jobs.stored import read_task
from sage_orchestrator.leases import ended_values, queued_values
from sage_orchestrator.models.service import ModelService
from sage_orchestrator.paging import PageOrder, list_page
from sage_orchestrator.rows import FileRow, JobRow

T = TypeVar("T")
AlsoStored = Callable[[Session, list[FineTuningJob]], None]

_MAX_CHECKS_BEGUN = 2
"""Without an end. What ends the orchestrator must not end it at every start."""
_FILE_PARAMS = ("training_file", "validation_file")
_WAITING = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.PAUSED)


class JobService:
    """`wake` is called after a commit that left a bell to ring; `check_later` after one that left a file to
    be checked in the background."""

    def __init__(
        self,
        database: Database,
        home: Home,
        clock: Clock,
        *,
        models: ModelService,
        checks: FileChecks,
        sync_validation_bytes: int,
        training_device: Callable[[], TrainingDevice | None],
        wake: Callable[[], None],
        check_later: Callable[[str], None],
    ) -> None:
        self._database = database
        self._home = home
        self._clock = clock
        self._models = models
        self._checks = checks
        self._sync_validation_bytes = sync_validation_bytes
        self._training_device = training_device
        self._wake = wake
        self._check_later = check_later

    def create(self, request: CreateJobRequest) -> FineTuningJob:
        """Resolve, check, store. Nothing is stored when anything is wrong with the request.

        Raises: InvalidRequestError, InvalidDataError (rows and fields), ModelNotFoundError, NotFoundError.
        """
        return self.create_together([request])[0]

    def create_together(
        self, requests: Sequence[CreateJobRequest], also: AlsoStored | None = None
    ) -> list[FineTuningJob]:
        """All jobs or none, with whatever `also` stores about them. Raises: as `create`."""
        now = self._clock()
        drafts = [
            (*self._new_row(request, new_id("ftjob"), now), self._uploads(request)) for request in requests
        ]
        checked: dict[tuple[str | None, ...], bool] = {}
        for row, _, uploads in drafts:
            files_and_task = (row.training_file, row.validation_file, row.task)
            if files_and_task not in checked:
                checked[files_and_task] = self._check_if_small(row, uploads)
            is_checked = checked[files_and_task]
            row.status = (JobStatus.QUEUED if is_checked else JobStatus.VALIDATING_FILES).value
            row.ring_at = now if is_checked else None
        with self._database.write() as session:
            for row, why, _ in drafts:
                self._store(session, row, why, now)
            created = [to_job(row, now) for row, _, _ in drafts]
            if also is not None:
                also(session, created)
        for job in created:
            self._wake() if job.status is JobStatus.QUEUED else self._check_later(job.id)
        return created

    def require_resolvable(self, request: CreateJobRequest) -> None:
        """Raises: as `create`, as far as that can be said without looking at the data."""
        self._new_row(request, new_id("ftjob"), self._clock())

    def finish_validation(self, job_id: str) -> None:
        """The background part of `create` for large files; harmless when done twice or too late.

        Raises: SageError for what may pass, as a full disk: the files are still to be checked.
        """
        with self._database.write() as session:
            row = jobs.get(session, job_id, lock=True)
            if row.status != JobStatus.VALIDATING_FILES.value:
                return
            ids = [file_id for file_id in (row.training_file, row.validation_file) if file_id]
            uploads = [files.get(session, file_id) for file_id in ids]
            begun = row.checks_begun or 0
            row.checks_begun = begun + 1
        try:
            if begun >= _MAX_CHECKS_BEGUN:
                raise InvalidDataError(
                    f"The check of the job's files was begun {begun} times, and each time the orchestrator "
                    "ended before it. Look at the files with `sage finetune validate`, split them, and "
                    "create the job again."
                )
            self._check_all(row, uploads)
        except SageError as error:
            if error.retryable or isinstance(error, StorageFullError):
                self._forget_checks(job_id)
                raise
            self._fail_validation(job_id, error)
            return
        now = self._clock()
        with self._database.write() as session:
            source = [JobStatus.VALIDATING_FILES]
            if jobs.transition(session, job_id, JobStatus.QUEUED, queued_values(now), sources=source):
                jobs.add_event(session, job_id, now, "Files validated, moving job to queued state")
        self._wake()

    def get(self, job_id: str) -> FineTuningJob:
        with self._database.read() as session:
            return to_job(jobs.get(session, job_id), self._clock())

    def list_jobs(
        self, *, after: str | None, limit: int, name: str | None, labels: dict[str, str]
    ) -> ListPage[FineTuningJob]:
        """Newest first."""
        with self._database.read() as session:
            rows, has_more = jobs.page(session, after=after, limit=limit, name=name, labels=labels)
            return list_page([to_job(row, self._clock()) for row in rows], has_more)

    def list_events(
        self, job_id: str, *, after: str | None, limit: int, order: PageOrder, kind: EventType | None
    ) -> ListPage[JobEvent]:
        """Of one kind, `last_id` of the last page forwards is the newest event of any kind: who goes on from
        there does not have the others looked through again."""
        is_followed = kind is not None and order == "asc"
        with self._database.read() as session:
            jobs.get(session, job_id)
            # Before the page: what comes between the two queries is not passed over.
            newest = jobs.newest_event(session, job_id) if is_followed else None
            rows, has_more = jobs.event_page(
                session, job_id, after=after, limit=limit, order=order, kind=kind
            )
        page = list_page([to_event(row) for row in rows], has_more)
        if newest is not None and not has_more and (not rows or rows[-1].seq < newest.seq):
            page.last_id = newest.id
        return page

    def list_checkpoints(self, job_id: str, *, after: str | None, limit: int) -> ListPage[JobCheckpoint]:
        with self._database.read() as session:
            job = jobs.get(session, job_id)
            rows, has_more = jobs.checkpoint_page(session, job_id, after=after, limit=limit)
            figures = jobs.figures_at(session, job_id, [row.step for row in rows])
            found = [
                to_checkpoint(
                    row, job, figures[row.step], is_kept=is_kept(self._home.resolve(row.path), job_id)
                )
                for row in rows
            ]
        return list_page(found, has_more)

    def cancel(self, job_id: str) -> FineTuningJob:
        """At once if nobody works on it; otherwise the worker is told with its next report.

        Raises: ConflictError when it has ended otherwise.
        """
        return self._stop(job_id, JobStatus.CANCELLED, Order.CANCEL)

    def pause(self, job_id: str) -> FineTuningJob:
        """Like cancel, but it can be resumed from its last checkpoint. Raises: ConflictError."""
        return self._stop(job_id, JobStatus.PAUSED, Order.PAUSE)

    def resume(self, job_id: str) -> FineTuningJob:
        """Back to the queue; a pause that has not happened yet is taken back. Raises: ConflictError."""
        now = self._clock()
        with self._database.write() as session:
            row = jobs.get(session, job_id, lock=True)
            status = JobStatus(row.status)
            if status is JobStatus.PAUSED:
                values = {**queued_values(now), "error": None}  # what it was paused for may be put right
                jobs.transition(session, job_id, JobStatus.QUEUED, values, sources=[status])
                jobs.add_event(session, job_id, now, "Job resumed, waiting for a worker")
            elif status is JobStatus.RUNNING and jobs.order_of(row) is Order.PAUSE:
                jobs.change(session, job_id, {"pending_order": Order.CONTINUE.value})
                jobs.add_event(session, job_id, now, "Pause taken back")
            elif status.is_terminal or status is JobStatus.VALIDATING_FILES:
                raise ConflictError(f"{job_id} is {status.value} and cannot be resumed.")
            job = to_job(jobs.get(session, job_id), now)
        self._wake()
        return job

    def _stop(self, job_id: str, target: JobStatus, order: Order) -> FineTuningJob:
        now = self._clock()
        with self._database.write() as session:
            row = jobs.lock_with_name(session, job_id)
            status = JobStatus(row.status)
            if status is JobStatus.RUNNING:
                # A cancellation is not softened to a pause by whoever comes later.
                if jobs.order_of(row) not in (order, Order.CANCEL):
                    jobs.change(session, job_id, {"pending_order": order.value})
                    jobs.add_event(session, job_id, now, f"Asked the worker to {order.value} the job")
            elif status in _WAITING and status.can_become(target):
                values = ended_values(now) if target.is_terminal else {"ring_at": None}
                jobs.transition(session, job_id, target, values, sources=[status])
                ledger.release(session, ledger.training_holder(job_id), now)
                if status is JobStatus.QUEUED and not jobs.is_name_running(session, row.name, besides=job_id):
                    jobs.wake_same_name(session, row.name, now)  # it may have been the one that was woken
                jobs.add_event(session, job_id, now, f"Job {target.value}")
            elif status is not target:
                raise ConflictError(f"{job_id} is {status.value}: it cannot become {target.value}.")
            return to_job(jobs.get(session, job_id), now)

    def _new_row(self, request: CreateJobRequest, job_id: str, now: float) -> tuple[JobRow, str]:
        """(what will be stored, why its preset was chosen or "")."""
        task = task_of(request)
        name = name_of(request, job_id)
        trainer = self._training_device()
        model = choose_model(request.model, task, self._home, trainer, self._models)
        preset, why = choose_preset(request.sage.preset, model, self._home, trainer)
        output_dir = self._home.relative(self._home.finetune_output / name)
        config = resolve_config(request, task=task, preset=preset, model=model, output_dir=output_dir)
        asked = hyperparameters_of(request)
        row = JobRow(
            id=job_id,
            name=name,
            task=task.value,
            preset=preset.value,
            model=model,
            config=config.model_dump(mode="json"),
            training_file=request.training_file,
            validation_file=request.validation_file,
            hyperparameters=asked.model_dump(mode="json", include=set(Hyperparameters.model_fields)),
            method=method_of(config, asked).model_dump(mode="json", exclude_none=True),
            labels=request.metadata,
            integrations=[
                integration.model_dump(mode="json", exclude_none=True)
                for integration in request.integrations or []
            ]
            or None,
            pending_order=Order.CONTINUE.value,
            metrics={},
            created_at=now,
            attempt=0,
            lost_attempts=0,
            rings=0,
        )
        return row, why

    def _uploads(self, request: CreateJobRequest) -> list[FileRow]:
        uploads = []
        with self._database.read() as session:
            for param in _FILE_PARAMS:
                file_id = getattr(request, param)
                if file_id is None:
                    continue
                upload = files.get(session, file_id, param=param)
                if upload.purpose != FilePurpose.FINE_TUNE.value:
                    raise InvalidRequestError(
                        f"{file_id} was uploaded for {upload.purpose!r}: upload it for 'fine-tune'.",
                        param=param,
                    )
                uploads.append(upload)
        return uploads

    def _store(self, session: Session, row: JobRow, why_preset: str, now: float) -> None:
        # The files may have been deleted while they were read.
        for param in _FILE_PARAMS:
            if file_id := getattr(row, param):
                files.get(session, file_id, param=param)
        session.add(row)
        session.flush()
        jobs.add_event(session, row.id, now, f"Created fine-tuning job: {row.id}")
        if why_preset:
            jobs.add_event(session, row.id, now, f"Preset {row.preset}: {why_preset}")
        queued = f"Queued: {row.name} on {row.model}, preset {row.preset}"
        is_queued = row.status == JobStatus.QUEUED.value
        checking = f"Validating training file: {row.training_file}"
        jobs.add_event(session, row.id, now, queued if is_queued else checking)

    def _check_if_small(self, row: JobRow, uploads: list[FileRow]) -> bool:
        """Whether the files were checked here and now; large ones, and slow ones, are in the background."""
        if sum(upload.size_bytes for upload in uploads) > self._sync_validation_bytes:
            return False
        return all(self._told_of(file, self._checks.check_at_once) for file in self._files(row, uploads))

    def _check_all(self, row: JobRow, uploads: list[FileRow]) -> None:
        for file in self._files(row, uploads):
            self._told_of(file, self._checks.check)

    def _files(self, row: JobRow, uploads: list[FileRow]) -> Iterator[DataFile]:
        for upload in uploads:
            yield DataFile(
                home=self._home.root,
                path=self._home.resolve(upload.path),
                filename=upload.filename,
                task=read_task(row.task),
                method=str(row.config.get("method", "sft")),
                model=str(row.config["model_name"]),
                is_held_out=upload.id != row.training_file,
            )

    @staticmethod
    def _told_of(file: DataFile, check: Callable[[DataFile], T]) -> T:
        param = "validation_file" if file.is_held_out else "training_file"
        try:
            return check(file)
        except (InvalidDataError, FileNotFoundError) as error:
            if not file.path.exists():
                # Deleted since its row was read: no job that needs it is known yet.
                raise NotFoundError(
                    f"The file {file.path.name} is gone: upload it again (POST /v1/files).", param=param
                ) from error
            if isinstance(error, InvalidDataError):
                error.param = param
            raise

    def _forget_checks(self, job_id: str) -> None:
        """They ended without a word on the files, but they ended."""
        with self._database.write() as session:
            jobs.get(session, job_id, lock=True).checks_begun = 0

    def _fail_validation(self, job_id: str, error: SageError) -> None:
        now = self._clock()
        values = {**ended_values(now), "error": {"code": error.code, "message": error.message,
                                                 "param": error.param or "training_file"}}  # fmt: skip
        with self._database.write() as session:
            if jobs.transition(
                session, job_id, JobStatus.FAILED, values, sources=[JobStatus.VALIDATING_FILES]
            ):
                jobs.add_event(session, job_id, now, error.message, level=EventLevel.ERROR)
