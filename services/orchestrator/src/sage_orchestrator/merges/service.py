"""Merges of an adapter into its base, and exports in other formats: leased work like a job, only shorter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from sage_contracts.errors import ConflictError, InvalidRequestError, NotYoursError
from sage_contracts.home import Home
from sage_contracts.models import ExportFormat, MergeJob, MergeRequest, MergeStatus
from sage_contracts.workers import ClaimRequest, MergeClaim, MergeFinish, MergeReport, ReportReply
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.ids import new_id
from sage_orchestrator.leases import ended_values, is_claimed_by, queued_values
from sage_orchestrator.merges import repository as merges
from sage_orchestrator.models import repository as models
from sage_orchestrator.models.service import ModelService
from sage_orchestrator.rows import MergeRow, VersionRow

PLAIN: ExportFormat = "safetensors"


@dataclass(frozen=True)
class MergeService:
    database: Database
    home: Home
    clock: Clock
    models: ModelService
    lease_s: float
    wake: Callable[[], None]

    def create(self, model: str, request: MergeRequest) -> MergeJob:
        """Queue a merge; one that is under way for this version already is returned instead.

        Raises: ModelNotFoundError; InvalidRequestError for a base model, and for what a model tuned in full
        does not have; ConflictError while one that writes something else to the same place is under way.
        """
        if model.startswith("base:"):
            raise InvalidRequestError(f"{model} is a base model: it has no adapter to merge.", param="model")
        now = self.clock()
        with self.database.write() as session:
            version = self.models.find(session, model)
            if not version.adapter_path:
                _require_whole(version, request)
            # Also keeps two requests for one version apart.
            models.lock_name(session, version.name)
            row = merges.unfinished(session, version.name, version.version, request)
            if row is None:
                # Beside its adapter: the next version must not replace what this one's merged_path names.
                folder = self.home.finetune_output / version.name / "versions" / str(version.version)
                row = MergeRow(
                    id=new_id("merge"),
                    name=version.name,
                    version=version.version,
                    dtype=request.dtype,
                    format=request.format,
                    content=request.content,
                    repo=request.repo,
                    allow_public=request.allow_public,
                    output_dir=self.home.relative(folder),
                    status=MergeStatus.QUEUED.value,
                    created_at=now,
                    attempt=0,
                    lost_attempts=0,
                    **queued_values(now),
                )
                session.add(row)
                session.flush()
            else:
                _require_same(row, request)
            job = to_object(row)
        self.wake()
        return job

    def get(self, merge_id: str) -> MergeJob:
        with self.database.read() as session:
            return to_object(merges.get(session, merge_id))

    def claim(self, merge_id: str, request: ClaimRequest) -> MergeClaim:
        """Raises: NotYoursError when it is not there to be taken."""
        now = self.clock()
        with self.database.write() as session:
            row = merges.get(session, merge_id, lock=True)
            values = {
                "status": MergeStatus.RUNNING.value,
                "attempt": row.attempt + 1,
                "worker_id": request.worker_id,
                "claim_id": request.claim_id,
                "lease_expires_at": now + self.lease_s,
                "ring_at": None,
            }
            if not is_claimed_by(row, request) and not merges.change(
                session, merge_id, values, sources=[MergeStatus.QUEUED], attempt=row.attempt
            ):
                raise NotYoursError(f"{merge_id} is {row.status}, not queued.")
            row = merges.get(session, merge_id)
            version = models.get_version(session, row.name, row.version)
            if version is None:
                raise NotYoursError(f"{row.name}@{row.version} is gone.")
            return MergeClaim(
                merge_id=merge_id,
                attempt=row.attempt,
                lease_s=self.lease_s,
                name=row.name,
                version=row.version,
                base_model=version.base_model,
                adapter_path=version.adapter_path,
                output_dir=row.output_dir,
                link_path=self._link_path(session, row),
                dtype=row.dtype,
                format=row.format,
                content=row.content,
                repo=row.repo,
                allow_public=bool(row.allow_public),
            )

    def _link_path(self, session: Session, row: MergeRow) -> str | None:
        """The top of a model's folder shows its newest version."""
        if row.format != PLAIN or models.lock_name(session, row.name).alias_version != row.version:
            return None
        return self.home.relative(self.home.finetune_output / row.name / "merged_model")

    def report(self, merge_id: str, report: MergeReport) -> ReportReply:
        """Raises: NotYoursError."""
        values = {"phase": report.phase, "lease_expires_at": self.clock() + self.lease_s}
        with self.database.write() as session:
            merges.get(session, merge_id)
            if not merges.change(
                session, merge_id, values, sources=[MergeStatus.RUNNING], attempt=report.attempt
            ):
                raise NotYoursError(f"{merge_id}: attempt {report.attempt} is over.")
        return ReportReply(lease_s=self.lease_s)

    def finish(self, merge_id: str, finish: MergeFinish) -> MergeJob:
        """The end of an attempt; said twice it counts once. Raises: NotYoursError, InvalidRequestError."""
        if finish.outcome == "succeeded" and not finish.merged_path:
            raise InvalidRequestError("A success names its merged_path.", param="merged_path")
        with self.database.write() as session:
            row = merges.get(session, merge_id, lock=True)
            values = _values_of(finish, self.clock())
            is_there = row.status == values["status"] or MergeStatus(row.status).is_terminal
            if row.attempt == finish.attempt and is_there:
                # The reply to the first time was lost on its way.
                return to_object(row)
            if not merges.change(
                session, merge_id, values, sources=[MergeStatus.RUNNING], attempt=finish.attempt
            ):
                raise NotYoursError(f"{merge_id}: attempt {finish.attempt} is over.")
            row = merges.get(session, merge_id)
            if finish.merged_path and finish.outcome == "succeeded" and row.format == PLAIN:
                models.set_merged(session, row.name, row.version, finish.merged_path)
            job = to_object(row)
        self.wake()
        return job


def _require_whole(version: VersionRow, request: MergeRequest) -> None:
    """Of a model tuned in full. Raises: InvalidRequestError, when its adapter is asked for."""
    if request.format == PLAIN:
        why = f"so there is nothing to merge: {version.base_model} is a plain model folder already."
    elif request.content == "adapter":
        why = "so it has no adapter to export: leave out content=adapter."
    else:
        return
    raise InvalidRequestError(f"{version.name}@{version.version} was tuned in full, {why}", param="model")


def _require_same(row: MergeRow, request: MergeRequest) -> None:
    """Raises: ConflictError, when the merge under way does not write what this request asks for."""
    if request.has_weights_of_dtype and row.dtype != request.dtype:
        raise ConflictError(
            f"{row.name}@{row.version} is being written with dtype={row.dtype} ({row.id}), and not with"
            f" dtype={request.dtype}: ask again when that merge has ended.",
            param="dtype",
        )
    if bool(row.allow_public) != request.allow_public:
        raise ConflictError(
            f"{row.name}@{row.version} is on its way to {request.repo} with another allow_public ({row.id}):"
            " ask again when that export has ended.",
            param="allow_public",
        )


def _values_of(finish: MergeFinish, now: float) -> dict[str, Any]:
    if finish.outcome == "succeeded":
        return {
            "status": MergeStatus.SUCCEEDED.value,
            "phase": None,
            "result_path": finish.merged_path,
            "report": finish.meta,
            **ended_values(now),
        }
    if finish.outcome == "failed":
        error = finish.error_message or "The merger gave no reason; see its log."
        return {"status": MergeStatus.FAILED.value, "phase": None, "error": error, **ended_values(now)}
    return {"status": MergeStatus.QUEUED.value, "phase": None, **queued_values(now)}


def to_object(row: MergeRow) -> MergeJob:
    return MergeJob(
        id=row.id,
        model=f"{row.name}@{row.version}",
        status=MergeStatus(row.status),
        phase=row.phase,
        created_at=int(row.created_at),
        finished_at=None if row.finished_at is None else int(row.finished_at),
        format=row.format,
        dtype=row.dtype,
        merged_path=row.result_path if row.format == PLAIN else None,
        result_path=row.result_path,
        report=row.report or {},
        error=row.error,
    )
