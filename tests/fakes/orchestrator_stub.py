"""The orchestrator's /internal routes for workers, in memory: real HTTP, real fencing, no database.

The records live in `Records`, not in the server, so that a test can stop the server and start another one on
the same port, as a restart of the orchestrator would.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI

from sage_contracts.config import TrainingConfig
from sage_contracts.errors import DeviceBusyError, NotFoundError, NotYoursError
from sage_contracts.workers import (
    ClaimRequest,
    Finish,
    MergeClaim,
    MergeFinish,
    MergeReport,
    Order,
    Outcome,
    Report,
    ReportReply,
    TrainClaim,
    WorkerBeat,
)
from sage_servicekit.app import create_app, require_internal
from sage_servicekit.settings import ServiceSettings

AFTER = {Outcome.SUCCEEDED: "succeeded", Outcome.FAILED: "failed", Outcome.CANCELLED: "cancelled"}
AFTER |= {Outcome.PAUSED: "paused", Outcome.SUSPENDED: "paused", Outcome.RELEASED: "queued"}


@dataclass
class Work:
    """A job or a merge, and all that workers said about it."""

    claim: TrainClaim | MergeClaim
    status: str = "queued"
    worker_id: str = ""
    order: Order = Order.CONTINUE
    reports: list[Any] = field(default_factory=list)
    finishes: list[Any] = field(default_factory=list)
    claims: int = 0
    refused_claims: int = 0
    busy_claims: int = 0
    """So many claims are answered with device_busy first."""

    @property
    def messages(self) -> list[str]:
        return [event.message for report in self.reports for event in report.events]

    @property
    def checkpoints(self) -> list[int]:
        return [checkpoint.step for report in self.reports for checkpoint in report.checkpoints]

    @property
    def metrics(self) -> Any:
        return next((report.metrics for report in reversed(self.reports) if report.metrics), None)


class Records:
    """What a database would hold. Every change wakes those who wait."""

    def __init__(self, lease_s: float = 30.0) -> None:
        self.works: dict[str, Work] = {}
        self.beats: list[WorkerBeat] = []
        self._lease_s = lease_s
        self._changed = threading.Condition()

    def add_job(self, job_id: str, name: str, *, version: int = 1, **extra: Any) -> Work:
        config = extra.pop("config", None) or TrainingConfig()
        claim = TrainClaim(
            job_id=job_id,
            attempt=0,
            lease_s=self._lease_s,
            name=name,
            version=version,
            config=config,
            output_dir=f"finetune_output/{name}",
            **extra,
        )
        return self.works.setdefault(job_id, Work(claim))

    def add_merge(self, merge_id: str, name: str, base_model: str, adapter_path: str, **extra: Any) -> Work:
        claim = MergeClaim(
            merge_id=merge_id,
            attempt=0,
            lease_s=self._lease_s,
            name=name,
            version=1,
            base_model=base_model,
            adapter_path=adapter_path,
            output_dir=f"finetune_output/{name}",
            **extra,
        )
        return self.works.setdefault(merge_id, Work(claim))

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        """Until `what()` is true; it is asked again at every change (and now and then)."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (found := what()):
                if time.monotonic() > deadline:
                    states = {key: (work.status, work.finishes) for key, work in self.works.items()}
                    raise AssertionError(f"did not happen within {timeout_s} s; works: {states}")
                self._changed.wait(0.2)
            return found

    def requeue(self, work_id: str) -> None:
        """As the sweeper does with an expired lease: the attempt that runs is stale from now on."""
        with self._changed:
            work = self.works[work_id]
            work.status, work.order = "queued", Order.CONTINUE
            work.claim.attempt += 1
            self._changed.notify_all()

    def claim(self, work_id: str, request: ClaimRequest) -> TrainClaim | MergeClaim:
        with self._changed:
            work = self._get(work_id)
            if work.busy_claims:
                work.busy_claims -= 1
                raise DeviceBusyError("cpu is busy: training other, about 1 min", retry_after_s=1)
            if work.status != "queued":
                work.refused_claims += 1
                self._changed.notify_all()
                raise NotYoursError(f"{work_id} is {work.status}")
            work.status, work.worker_id = "running", request.worker_id
            work.claims += 1
            work.claim.attempt += 1
            self._changed.notify_all()
            return work.claim

    def report(self, work_id: str, report: Report | MergeReport) -> ReportReply:
        with self._changed:
            work = self._owned(work_id, report)
            work.reports.append(report)
            self._changed.notify_all()
            return ReportReply(order=work.order, lease_s=self._lease_s)

    def finish(self, work_id: str, finish: Finish | MergeFinish) -> None:
        with self._changed:
            work = self._owned(work_id, finish)
            work.finishes.append(finish)
            work.status = AFTER[Outcome(finish.outcome)]
            work.order = Order.CONTINUE
            self._changed.notify_all()

    def _get(self, work_id: str) -> Work:
        if work_id not in self.works:
            raise NotFoundError(f"There is no {work_id}")
        return self.works[work_id]

    def _owned(self, work_id: str, message: Any) -> Work:
        work = self._get(work_id)
        if work.status != "running" or message.attempt != work.claim.attempt:
            raise NotYoursError(f"{work_id} is {work.status}, attempt {work.claim.attempt}")
        return work


def build_app(records: Records, settings: ServiceSettings) -> FastAPI:
    app = create_app("orchestrator-stub", settings)
    router = APIRouter(prefix="/internal", dependencies=[Depends(require_internal)])

    @router.post("/jobs/{work_id}/claim")
    def claim_job(work_id: str, request: ClaimRequest) -> Any:
        return records.claim(work_id, request)

    @router.post("/jobs/{work_id}/events")
    def job_events(work_id: str, report: Report) -> ReportReply:
        return records.report(work_id, report)

    @router.post("/jobs/{work_id}/finish")
    def finish_job(work_id: str, finish: Finish) -> dict[str, str]:
        records.finish(work_id, finish)
        return {}

    @router.post("/merges/{work_id}/claim")
    def claim_merge(work_id: str, request: ClaimRequest) -> Any:
        return records.claim(work_id, request)

    @router.post("/merges/{work_id}/events")
    def merge_events(work_id: str, report: MergeReport) -> ReportReply:
        return records.report(work_id, report)

    @router.post("/merges/{work_id}/finish")
    def finish_merge(work_id: str, finish: MergeFinish) -> dict[str, str]:
        records.finish(work_id, finish)
        return {}

    @router.post("/workers/beat")
    def beat(message: WorkerBeat) -> dict[str, str]:
        records.beats.append(message)
        return {}

    app.include_router(router)
    return app


class StubServer:
    """Serves the records on one port; can be stopped and started again there."""

    def __init__(self, records: Records, home: Path, token: str | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._app = build_app(records, ServiceSettings(home_dir=home, internal_token=token))
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = uvicorn.Config(self._app, port=self.port, log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="orchestrator-stub")
        self._thread.start()
        deadline = time.monotonic() + 15
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the stub did not start"
            self._thread.join(0.01)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=15)
            self._server = self._thread = None
