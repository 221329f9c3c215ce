"""The job's state machine under random workers, owners and losses, on any database."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from tests.fakes.orchestrator_rig import GIB, HandClock, ListBell, empty

from sage_contracts.config import Task
from sage_contracts.errors import ConflictError, DeviceBusyError, NotYoursError
from sage_contracts.jobs import CreateJobRequest, JobStatus, SageJobOptions
from sage_contracts.workers import ClaimRequest, Finish, Outcome, Report
from sage_orchestrator.jobs import repository
from sage_orchestrator.main import Orchestrator
from sage_orchestrator.settings import OrchestratorSettings

WORKERS = st.sampled_from(["w1", "w2", "w3"])
NAMES = st.sampled_from(["code", "other"])


class JobMachine(RuleBasedStateMachine):
    """The test remembers every attempt ever given out; the orchestrator must only ever obey the newest."""

    jobs = Bundle("jobs")
    database_url: str

    @initialize()
    def start(self) -> None:
        self.home = Path(tempfile.mkdtemp())
        self.clock, self.bell = HandClock(), ListBell()
        chosen = OrchestratorSettings(home_dir=self.home, database_url=self.database_url)
        self.parts = Orchestrator(chosen, self.clock, self.bell)
        empty(self.parts.database)
        self.newest: dict[str, int] = {}
        self.given: list[tuple[str, int, str]] = []
        self.ended: dict[str, JobStatus] = {}
        self.versions: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "parts"):
            self.parts.stop()
            shutil.rmtree(self.home)

    @rule(target=jobs, name=NAMES)
    def create(self, name: str) -> str:
        options = SageJobOptions(task=Task.CODE, name=name)
        job = self.parts.jobs.create(CreateJobRequest(model="smollm2-135m", sage=options))
        self.newest[job.id] = 0
        return job.id

    @rule(job_id=jobs, worker=WORKERS)
    def claim(self, job_id: str, worker: str) -> None:
        before = self.parts.jobs.get(job_id).status
        request = ClaimRequest(worker_id=worker, device="cpu", device_total_bytes=8 * GIB)
        try:
            claim = self.parts.attempts.claim(job_id, request)
        except (NotYoursError, DeviceBusyError):
            return
        assert before is JobStatus.QUEUED
        assert claim.attempt == self.newest[job_id] + 1
        self.newest[job_id] = claim.attempt
        self.given.append((job_id, claim.attempt, worker))
        # Its number is kept over attempts, and nobody else's.
        assert self.versions.setdefault(job_id, claim.version) == claim.version
        same_name = [j for j in self.versions if self.parts.jobs.get(j).sage.name == claim.name]
        assert len({self.versions[j] for j in same_name}) == len(same_name)

    def _pick(self, data: Any) -> tuple[str, int, str] | None:
        return data.draw(st.sampled_from(self.given)) if self.given else None

    @rule(data=st.data())
    def report(self, data: Any) -> None:
        if (attempt := self._pick(data)) is None:
            return
        job_id, number, worker = attempt
        was_running = self.parts.jobs.get(job_id).status is JobStatus.RUNNING
        try:
            self.parts.attempts.report(job_id, Report(worker_id=worker, attempt=number))
        except NotYoursError:
            assert not (was_running and number == self.newest[job_id])
        else:
            assert was_running and number == self.newest[job_id]

    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def finish(self, data: Any, outcome: Outcome) -> None:
        if (attempt := self._pick(data)) is None:
            return
        job_id, number, worker = attempt
        before = self.parts.jobs.get(job_id)
        finish = Finish(
            worker_id=worker, attempt=number, outcome=outcome, base_model="base", adapter_path="adapter"
        )
        try:
            self.parts.attempts.finish(job_id, finish)
        except NotYoursError:
            assert number != self.newest[job_id]
            return
        assert number == self.newest[job_id]
        if before.status is not JobStatus.RUNNING:
            assert self.parts.jobs.get(job_id) == before

    @rule(job_id=jobs, verb=st.sampled_from(["cancel", "pause", "resume"]))
    def owner(self, job_id: str, verb: str) -> None:
        try:
            getattr(self.parts.jobs, verb)(job_id)
        except ConflictError:
            assert self.parts.jobs.get(job_id).status.is_terminal

    @rule(seconds=st.sampled_from([1, 10, 31, 100]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.parts.sweeper.take_back()
        self.parts.sweeper.ring_due()

    @invariant()
    def the_end_is_the_end(self) -> None:
        for job_id in getattr(self, "newest", {}):
            status = self.parts.jobs.get(job_id).status
            if job_id in self.ended:
                assert status is self.ended[job_id]
            elif status.is_terminal:
                self.ended[job_id] = status

    @invariant()
    def one_attempt_a_name_and_a_device_for_each(self) -> None:
        jobs = [self.parts.jobs.get(job_id) for job_id in getattr(self, "newest", {})]
        running = [job for job in jobs if job.status is JobStatus.RUNNING]
        assert len({job.sage.name for job in running}) == len(running)
        if not jobs:
            return
        leases = [lease for device in self.parts.devices.states() for lease in device.leases]
        assert {lease.holder for lease in leases} == {f"train:{job.id}" for job in running}
        for device in self.parts.devices.states():
            assert device.leased_bytes <= device.total_bytes

    @invariant()
    def whoever_waits_will_be_rung_for(self) -> None:
        if not hasattr(self, "parts"):
            return
        waiting = [job_id for job_id in self.newest if self.parts.jobs.get(job_id).status is JobStatus.QUEUED]
        with self.parts.database.read() as session:
            assert all(repository.get(session, job_id).ring_at is not None for job_id in waiting)

    @invariant()
    def a_success_is_a_model(self) -> None:
        if not hasattr(self, "parts"):
            return
        models = {card.id for card in self.parts.models.list_models()}
        tuned = {self.parts.jobs.get(job_id).fine_tuned_model for job_id in self.newest} - {None}
        assert tuned == {model for model in models if "@" in model}


def run_job_machine(database_url: str, *, examples: int) -> None:
    """On a migrated database, which is emptied for each example."""
    JobMachine.database_url = database_url
    JobMachine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    JobMachine.TestCase("runTest").runTest()
