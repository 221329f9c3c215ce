"""A sweep's state under jobs that end in any way and order, owners who cancel, and a clock that is late."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fakes.orchestrator_rig import GIB, HandClock, ListBell, empty

from sage_contracts.config import Task
from sage_contracts.errors import ConflictError, DeviceBusyError, NotYoursError
from sage_contracts.jobs import JobMetrics, JobStatus, SageJobOptions
from sage_contracts.sweeps import (
    CreateSweepRequest,
    Sweep,
    SweepChild,
    SweepStatus,
    grid_points,
    point_fields,
)
from sage_contracts.workers import ClaimRequest, Finish, Outcome
from sage_orchestrator.main import Orchestrator
from sage_orchestrator.settings import OrchestratorSettings
from sage_orchestrator.sweeps.outcome import best_of, status_of

LOSSES = st.sampled_from([None, 1.0, 1.5, 2.0])
STATUSES = st.lists(st.sampled_from(JobStatus), min_size=1, max_size=6)


class SweepMachine(RuleBasedStateMachine):
    database_url: str

    @initialize(ranks=st.integers(1, 3))
    def start(self, ranks: int) -> None:
        self.home = Path(tempfile.mkdtemp())
        chosen = OrchestratorSettings(home_dir=self.home, database_url=self.database_url)
        self.parts = Orchestrator(chosen, HandClock(), ListBell())
        empty(self.parts.database)
        request = CreateSweepRequest(
            model="smollm2-135m",
            sage=SageJobOptions(task=Task.CODE),
            grid={"lora.r": [2**n for n in range(ranks)]},
        )
        self.id = self.parts.sweeps.create(request).id
        self.ended: Sweep | None = None

    def teardown(self) -> None:
        if hasattr(self, "parts"):
            self.parts.stop()
            shutil.rmtree(self.home)

    @property
    def sweep(self) -> Sweep:
        return self.parts.sweeps.get(self.id)

    def draw_child(self, data: Any) -> SweepChild:
        child: SweepChild = data.draw(st.sampled_from(self.sweep.children))
        return child

    @rule(data=st.data())
    def claim(self, data: Any) -> None:
        request = ClaimRequest(worker_id="w", device="cpu", device_total_bytes=8 * GIB)
        try:
            self.parts.attempts.claim(self.draw_child(data).job_id, request)
        except (NotYoursError, DeviceBusyError):
            return

    @rule(data=st.data(), outcome=st.sampled_from(Outcome), loss=LOSSES)
    def finish(self, data: Any, outcome: Outcome, loss: float | None) -> None:
        running = [child for child in self.sweep.children if child.status is JobStatus.RUNNING]
        if not running:
            return
        job_id = data.draw(st.sampled_from(running)).job_id
        finish = Finish(
            worker_id="w",
            attempt=self.parts.jobs.get(job_id).sage.attempt,
            outcome=outcome,
            metrics=JobMetrics(eval_loss=loss),
            base_model="base",
            adapter_path=f"adapters/{job_id}",
        )
        self.parts.attempts.finish(job_id, finish)

    @rule(data=st.data(), verb=st.sampled_from(["cancel", "pause", "resume"]))
    def owner_of_a_job(self, data: Any, verb: str) -> None:
        try:
            getattr(self.parts.jobs, verb)(self.draw_child(data).job_id)
        except ConflictError:
            return

    @rule()
    def cancel(self) -> None:
        try:
            self.parts.sweeps.cancel(self.id)
        except ConflictError:
            assert self.sweep.status in (SweepStatus.SUCCEEDED, SweepStatus.FAILED)

    @rule()
    def time_passes(self) -> None:
        self.parts.sweeps.tend()
        if all(child.status.is_terminal for child in self.sweep.children):
            assert self.sweep.status.is_terminal

    @precondition(lambda self: hasattr(self, "parts"))
    @invariant()
    def all_is_well(self) -> None:
        seen = self.sweep
        names = {card.id for card in self.parts.models.list_models()}
        if seen.status.is_terminal:
            assert all(child.status.is_terminal for child in seen.children)
            # Whatever comes later, the end stays what it was.
            self.ended = self.ended or seen
            assert seen == self.ended
        assert ("code" in names) == (seen.fine_tuned_model is not None)
        if seen.status is SweepStatus.SUCCEEDED and seen.best_job_id is not None:
            best = next(child for child in seen.children if child.job_id == seen.best_job_id)
            losses = [child.eval_loss for child in seen.children if child.status is JobStatus.SUCCEEDED]
            assert best.eval_loss == min(loss for loss in losses if loss is not None)
            assert self.parts.models.resolve("code").adapter_path == f"adapters/{best.job_id}"
            assert {name for name in names if name.startswith("code@")} == {"code@1"}


def test_random_jobs_owners_and_clocks(tmp_path: Path, migrated: Path) -> None:
    SweepMachine.database_url = f"sqlite:///{shutil.copy(migrated, tmp_path)}"
    SweepMachine.TestCase.settings = settings(
        max_examples=8,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    SweepMachine.TestCase("runTest").runTest()


@given(statuses=STATUSES, is_cancelling=st.booleans())
def test_a_sweep_ends_with_its_last_job(statuses: list[JobStatus], is_cancelling: bool) -> None:
    status = status_of(statuses, is_cancelling=is_cancelling)
    assert status.is_terminal == all(each.is_terminal for each in statuses)
    assert (status is SweepStatus.SUCCEEDED) == (
        status.is_terminal and not is_cancelling and JobStatus.SUCCEEDED in statuses
    )


@given(
    children=st.lists(
        st.tuples(st.sampled_from(JobStatus), st.none() | st.floats(allow_nan=True)), min_size=1, max_size=6
    )
)
def test_the_best_is_a_success_and_none_is_better(children: list[tuple[JobStatus, float | None]]) -> None:
    made = [
        SweepChild(job_id=str(number), name="n", point={}, status=status, eval_loss=loss)
        for number, (status, loss) in enumerate(children)
    ]
    best = best_of(made)
    if best is None:
        return
    assert best.status is JobStatus.SUCCEEDED and best.eval_loss is not None
    for child in made:
        if child.status is JobStatus.SUCCEEDED and child.eval_loss is not None:
            assert not child.eval_loss < best.eval_loss or child.eval_loss == float("-inf")


@given(
    grid=st.dictionaries(
        st.sampled_from(["learning_rate", "weight_decay", "lora.r", "lora.lora_alpha"]),
        st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
        min_size=1,
    )
)
def test_a_grid_is_every_combination_once(grid: dict[str, list[Any]]) -> None:
    points = grid_points(grid, max_jobs=81)
    assert len({tuple(point.items()) for point in points}) == len(points)
    for name, values in grid.items():
        assert [point[name] for point in points].count(values[0]) * len(values) == len(points)
        folder, _, inner = name.rpartition(".")
        fields = [point_fields(point) for point in points]
        assert {(each[folder] if folder else each)[inner] for each in fields} == set(values)
