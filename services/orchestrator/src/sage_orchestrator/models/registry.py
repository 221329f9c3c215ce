"""A finished job becomes a version, and its name moves there."""

from __future__ import annotations

from sqlalchemy.orm import Session

from sage_contracts.config import TrainingConfig
from sage_contracts.home import Home
from sage_contracts.jobs import JobMetrics
from sage_contracts.workers import Finish
from sage_orchestrator.models import repository as models
from sage_orchestrator.rows import JobRow, VersionRow


def register_version(session: Session, job: JobRow, finish: Finish, metrics: JobMetrics, now: float) -> None:
    """Inside the transaction that ends the job, so that neither is ever seen without the other."""
    name = models.lock_name(session, job.name)
    version = job.version or 0
    session.add(
        VersionRow(
            name=job.name,
            version=version,
            created_at=now,
            task=job.task,
            job_id=job.id,
            base_model=finish.base_model or "",
            adapter_path=finish.adapter_path or "",
            lora_rank=TrainingConfig.model_validate(job.config).lora.r,
            base_eval_loss=metrics.base_eval_loss,
            eval_loss=metrics.eval_loss,
            meta=finish.meta,
        )
    )
    # A paused job that ends after a younger one does not pull the name back.
    name.alias_version = max(version, name.alias_version or 0)
    session.flush()


def versions_on_disk(home: Home, name: str) -> int:
    """The highest version with a folder: a new database beside old files must not write over them."""
    folder = home.finetune_output / name / "versions"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)
