"""The composition root: builds the orchestrator and serves it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import FastAPI

from sage_contracts.errors import NotFoundError, SageError
from sage_contracts.jobs import JobStatus
from sage_contracts.uploads import UPLOAD_PATHS
from sage_orchestrator.clock import Clock, Jumps, Rounds
from sage_orchestrator.database import READERS, WRITERS, Database
from sage_orchestrator.devices import endpoints as device_endpoints
from sage_orchestrator.devices.service import DeviceService
from sage_orchestrator.doorbell import CeleryDoorbell, Doorbell
from sage_orchestrator.files import endpoints as file_endpoints
from sage_orchestrator.files.service import FileService
from sage_orchestrator.jobs import endpoints as job_endpoints
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.jobs.attempts import AttemptService
from sage_orchestrator.jobs.checking import FileChecks
from sage_orchestrator.jobs.service import JobService
from sage_orchestrator.merges import endpoints as merge_endpoints
from sage_orchestrator.merges.service import MergeService
from sage_orchestrator.models import endpoints as model_endpoints
from sage_orchestrator.models.service import ModelService
from sage_orchestrator.settings import OrchestratorSettings
from sage_orchestrator.sweeper import Periodic, Sweeper
from sage_orchestrator.sweeps import endpoints as sweep_endpoints
from sage_orchestrator.sweeps.service import SweepService
from sage_orchestrator.uploads import endpoints as upload_endpoints
from sage_orchestrator.uploads.service import UploadService
from sage_orchestrator.workers import endpoints as worker_endpoints
from sage_orchestrator.workers.service import WorkerService
from sage_servicekit import logs, serve
from sage_servicekit.app import create_app
from sage_servicekit.settings import from_env

logger = logging.getLogger(__name__)

NAME = "orchestrator"
_HOUSEKEEPING_S = 60.0


class Orchestrator:
    """All parts, wired. `prepare` brings the state up to date, `start` begins to act on it."""

    def __init__(
        self, settings: OrchestratorSettings, clock: Clock, doorbell: Doorbell, *, steady: Clock | None = None
    ) -> None:
        """`steady` runs like `clock`, from any start, and is never set; None: nor is that one."""
        home, steady = settings.home, steady or clock
        self.database = Database(settings.resolved_database_url)
        # Rounds that come as they should leave time for several reports within a lease.
        rounds = Rounds(steady, max(settings.lease_s / 3, 3 * settings.sweep_interval_s))
        self.sweeper = Sweeper(self.database, doorbell, clock, settings, Jumps(clock, steady), rounds)
        # Two threads: a broker that hangs must not keep lost jobs from being taken back.
        self._ringer = Periodic("ringer", settings.sweep_interval_s, self.sweeper.ring_due)
        self._taker = Periodic("sweeper", settings.sweep_interval_s, self._sweep)
        self._housekeeper = Periodic("housekeeper", _HOUSEKEEPING_S, self.keep_house)
        self._validator = ThreadPoolExecutor(1, "validator")
        self.being_checked: set[str] = set()
        """The jobs whose files are, or wait for it."""
        self.files = FileService(self.database, home, clock)
        self.uploads = UploadService(self.database, home, clock, self.files, settings.max_file_bytes)
        self.workers = WorkerService(self.database, clock, settings.worker_seen_s)
        self.devices = DeviceService(self.database, clock, settings.device_lease_s, self._ringer.wake)
        self.models = ModelService(self.database, home)
        self.checks = FileChecks(
            home,
            memory_bytes=settings.resolved_check_memory_bytes,
            timeout_s=settings.check_timeout_s,
            at_once_s=settings.sync_validation_s,
        )
        self.jobs = JobService(
            self.database,
            home,
            clock,
            models=self.models,
            checks=self.checks,
            sync_validation_bytes=settings.sync_validation_bytes,
            training_device=self.workers.training_device,
            wake=self._ringer.wake,
            check_later=self._check_later,
        )
        self.attempts = AttemptService(self.database, home, clock, settings.lease_s, self._ringer.wake)
        self.sweeps = SweepService(self.database, home, clock, self.jobs)
        self.merges = MergeService(
            self.database, home, clock, self.models, settings.lease_s, self._ringer.wake
        )

    def prepare(self) -> None:
        """Upgrade the schema and take up what the last process left. Raises: SageError."""
        self.database.upgrade()
        # Before anybody is heard or missed: what ran while no orchestrator did is still its workers'.
        self.sweeper.renew_all()
        self._take_up_checks()

    def start(self) -> None:
        for thread in (self._ringer, self._taker, self._housekeeper):
            thread.start()

    def stop(self) -> None:
        for thread in (self._ringer, self._taker, self._housekeeper):
            thread.stop()
        # A file that is still being checked is checked again after the next start.
        self.checks.stop()
        self._validator.shutdown(wait=True, cancel_futures=True)
        self.database.close()

    def _sweep(self) -> None:
        if self.sweeper.sweep():
            self._ringer.wake()
        self.sweeps.tend()

    def keep_house(self) -> None:
        """What needs doing once a minute."""
        self._take_up_checks()
        self.files.delete_expired()
        self.files.remove_stale_uploads()
        self.uploads.delete_expired()
        self.devices.delete_expired()
        self.workers.forget_unseen()

    def _take_up_checks(self) -> None:
        """Those that the last process left, and those that a busy database or a full disk cut short."""
        with self.database.read() as session:
            unchecked = jobs.ids_in(session, JobStatus.VALIDATING_FILES)
        for job_id in unchecked:
            if job_id not in self.being_checked:
                self._check_later(job_id)

    def _check_later(self, job_id: str) -> None:
        self.being_checked.add(job_id)
        self._validator.submit(self._validate, job_id)

    def _validate(self, job_id: str) -> None:
        try:
            self.jobs.finish_validation(job_id)
        except NotFoundError:
            logger.warning("job %s or its file is gone before it was checked", job_id)
        except SageError as error:
            logger.warning("the files of job %s are still to be checked: %s", job_id, error.message)
        except Exception:
            logger.exception("the check of job %s broke; it is repeated in a minute", job_id)
        finally:
            self.being_checked.discard(job_id)


def build_app(
    settings: OrchestratorSettings,
    *,
    clock: Clock = time.time,
    steady: Clock | None = None,
    doorbell: Doorbell | None = None,
) -> FastAPI:
    """The HTTP app; its lifespan prepares, starts and stops the parts (`app.state.orchestrator`)."""
    parts = Orchestrator(settings, clock, doorbell or CeleryDoorbell(settings), steady=steady)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # So many that changes which wait for the database leave some for whoever only reads.
        to_thread.current_default_thread_limiter().total_tokens = READERS + WRITERS
        parts.prepare()
        parts.start()
        try:
            yield
        finally:
            parts.stop()

    app = create_app(NAME, settings, lifespan, uploads=UPLOAD_PATHS)
    app.state.orchestrator = parts
    app.include_router(file_endpoints.make_router(parts.files, settings.max_file_bytes))
    app.include_router(upload_endpoints.make_router(parts.uploads))
    app.include_router(job_endpoints.make_router(parts.jobs))
    app.include_router(job_endpoints.make_internal_router(parts.attempts))
    app.include_router(model_endpoints.make_router(parts.models))
    app.include_router(merge_endpoints.make_router(parts.merges))
    app.include_router(sweep_endpoints.make_router(parts.sweeps))
    app.include_router(device_endpoints.make_router(parts.devices))
    app.include_router(worker_endpoints.make_router(parts.workers))
    return app


def main() -> None:
    settings = from_env(OrchestratorSettings)
    logs.configure(NAME, settings.log_level)
    # Alembic tells of every table it looks at.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        app = build_app(settings, steady=time.monotonic)
        database = app.state.orchestrator.database
        database.hold()
        # Once here for a message instead of a traceback; the lifespan finds nothing left to do.
        database.upgrade()
    except SageError as error:
        logger.error("%s", error.message)
        sys.exit(1)
    serve.run(app, settings.host, settings.orchestrator_port)
