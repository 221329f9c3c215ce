"""The job's state machine under random workers, owners and losses, on any database."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fakes.orchestrator_rig import GIB, HandClock, ListBell, empty

from sage_contracts.config import Task
from sage_contracts.errors import ConflictError, DeviceBusyError, NotYoursError
from sage_contracts.jobs import CreateJobRequest, FineTuningJob, JobStatus, SageJobOptions
from sage_contracts.workers import ClaimRequest, Finish, Outcome, Report
from sage_orchestrator.jobs import repository
from sage_orchestrator.main import Orchestrator
from sage_orchestrator.settings import OrchestratorSettings

# Few of each, so that they meet often.
WORKERS = st.sampled_from(["w1", "w2"])
NAMES = st.sampled_from(["code", "other"])
MOST_JOBS = 3
STEPS = 40


class JobMachine(RuleBasedStateMachine):
    """The test remembers every attempt ever given out; the orchestrator must only ever obey the newest."""

    database_url: str

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.clock, self.bell = HandClock(), ListBell()
        self.chosen = OrchestratorSettings(home_dir=self.home, database_url=self.database_url)
        self.parts = Orchestrator(self.chosen, self.clock, self.bell)
        empty(self.parts.database)
        self.newest: dict[str, int] = {}
        self.given: list[tuple[str, int, str]] = []
        self.last: dict[str, JobStatus] = {}
        self.versions: dict[str, int] = {}
        self.unwanted: set[str] = set()
        self.create("code")

    def teardown(self) -> None:
        if hasattr(self, "parts"):
            self.parts.stop()
            shutil.rmtree(self.home)

    def status(self, job_id: str) -> JobStatus:
        return self.parts.jobs.get(job_id).status

    @precondition(lambda self: len(self.newest) < MOST_JOBS)
    @rule(name=NAMES)
    def create(self, name: str) -> None:
        options = SageJobOptions(task=Task.CODE, name=name)
        job = self.parts.jobs.create(CreateJobRequest(model="smollm2-135m", sage=options))
        self.newest[job.id] = 0

    @rule(data=st.data(), worker=WORKERS)
    def claim(self, data: Any, worker: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.newest)))
        before = self.status(job_id)
        request = ClaimRequest(worker_id=worker, device="cpu", device_total_bytes=8 * GIB)
        try:
            claim = self.parts.attempts.claim(job_id, request)
        except (NotYoursError, DeviceBusyError):
            return
        assert before is JobStatus.QUEUED
        assert claim.attempt == self.newest[job_id] + 1
        self.newest[job_id] = claim.attempt
        self.given.append((job_id, claim.attempt, worker))
        # Its number is kept over attempts, and is nobody else's.
        assert self.versions.setdefault(job_id, claim.version) == claim.version
        same_name = [job for job in self.versions if self.parts.jobs.get(job).sage.name == claim.name]
        assert len({self.versions[job] for job in same_name}) == len(same_name)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def report(self, data: Any) -> None:
        job_id, number, worker = data.draw(st.sampled_from(self.given))
        is_current = self.status(job_id) is JobStatus.RUNNING and number == self.newest[job_id]
        try:
            self.parts.attempts.report(job_id, Report(worker_id=worker, attempt=number))
        except NotYoursError:
            assert not is_current
        else:
            assert is_current

    @precondition(lambda self: self.given)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def finish(self, data: Any, outcome: Outcome) -> None:
        job_id, number, worker = data.draw(st.sampled_from(self.given))
        before = self.parts.jobs.get(job_id)
        finish = Finish(
            worker_id=worker, attempt=number, outcome=outcome, base_model="base", adapter_path="adapter"
        )
        try:
            self.parts.attempts.finish(job_id, finish)
        except NotYoursError:
            # Its job runs elsewhere, or was taken back: had it been heard, it would stand elsewhere.
            assert number != self.newest[job_id] or before.status in (JobStatus.QUEUED, JobStatus.PAUSED)
            return
        assert number == self.newest[job_id]
        if outcome is Outcome.SUCCEEDED:
            assert self.status(job_id).is_terminal
        if before.status is not JobStatus.RUNNING:
            assert self.parts.jobs.get(job_id) == before

    @rule(data=st.data(), verb=st.sampled_from(["cancel", "pause", "resume"]))
    def owner(self, data: Any, verb: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.newest)))
        try:
            getattr(self.parts.jobs, verb)(job_id)
        except ConflictError:
            assert self.status(job_id).is_terminal
        else:
            if verb == "cancel":
                self.unwanted.add(job_id)

    @rule(seconds=st.sampled_from([10, 31]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.parts.sweeper.rounds.end()  # the last of those that came meanwhile and found nothing
        self.parts.sweeper.sweep()
        self.parts.sweeper.ring_due()

    @rule(seconds=st.sampled_from([10, 31]), is_restarted=st.booleans())
    def nobody_is_heard(self, seconds: int, is_restarted: bool) -> None:
        """The orchestrator or its database is away, and back: what runs then still runs."""
        running = [job_id for job_id in self.newest if self.status(job_id) is JobStatus.RUNNING]
        self.clock.advance(seconds)
        if is_restarted:
            self.parts.stop()
            self.parts = Orchestrator(self.chosen, self.clock, self.bell)
            self.parts.prepare()
        self.parts.sweeper.sweep()
        self.parts.sweeper.ring_due()
        if is_restarted or seconds > 10:
            assert all(self.status(job_id) is JobStatus.RUNNING for job_id in running)

    @invariant()
    def all_is_well(self) -> None:
        if not hasattr(self, "parts"):
            return
        jobs = self.parts.jobs.list_jobs(after=None, limit=100, name=None, labels={}).data
        self._the_end_is_the_end(jobs)
        self._one_attempt_for_a_name_and_a_lease_for_each([job for job in jobs if job.status == "running"])
        with self.parts.database.read() as session:
            waiting = [job.id for job in jobs if job.status is JobStatus.QUEUED]
            assert all(repository.get(session, job_id).ring_at is not None for job_id in waiting)
        models = {card.id for card in self.parts.models.list_models() if "@" in card.id}
        assert models == {job.fine_tuned_model for job in jobs if job.status is JobStatus.SUCCEEDED}

    def _the_end_is_the_end(self, jobs: list[FineTuningJob]) -> None:
        for job in jobs:
            last = self.last.get(job.id, job.status)
            assert job.status is last or not last.is_terminal
            self.last[job.id] = job.status
            if job.id in self.unwanted:
                # An attempt that runs may still come to its own end, but no other one begins.
                assert job.status.is_terminal or job.status is JobStatus.RUNNING

    def _one_attempt_for_a_name_and_a_lease_for_each(self, running: list[FineTuningJob]) -> None:
        assert len({job.sage.name for job in running}) == len(running)
        devices = self.parts.devices.states()
        assert {lease.holder for device in devices for lease in device.leases} == {
            f"train:{job.id}" for job in running
        }
        assert all(device.leased_bytes <= device.total_bytes for device in devices)


def run_job_machine(database_url: str, *, examples: int) -> None:
    """On a migrated database, which is emptied for each example."""
    JobMachine.database_url = database_url
    JobMachine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    JobMachine.TestCase("runTest").runTest()
