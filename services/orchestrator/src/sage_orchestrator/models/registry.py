"""A finished job becomes a version, and its name moves there."""

from __future__ import annotations

from sqlalchemy.orm import Session

from sage_contracts.home import Home
from sage_contracts.jobs import JobMetrics
from sage_contracts.workers import Finish
from sage_orchestrator.jobs.stored import read_settings
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
            lora_rank=read_settings(job).config.lora.r,
            base_eval_loss=metrics.base_eval_loss,
            eval_loss=metrics.eval_loss,
            meta=finish.meta,
        )
    )
    # A paused job that ends after a younger one does not pull the name back.
    name.alias_version = max(version, name.alias_version or 0)
    session.flush()


def promote(session: Session, best: VersionRow, name: str, *, at_least: int, now: float) -> VersionRow:
    """A new version of `name` on the adapter of another name's version; the name moves there."""
    version = VersionRow(
        name=name,
        version=models.reserve_version(session, name, at_least=at_least),
        created_at=now,
        task=best.task,
        job_id=best.job_id,
        base_model=best.base_model,
        adapter_path=best.adapter_path,
        merged_path=best.merged_path,
        lora_rank=best.lora_rank,
        base_eval_loss=best.base_eval_loss,
        eval_loss=best.eval_loss,
        meta={**best.meta, "same_as": f"{best.name}@{best.version}"},
    )
    session.add(version)
    models.lock_name(session, name).alias_version = version.version
    session.flush()
    return version


def versions_on_disk(home: Home, name: str) -> int:
    """The highest version with a folder: a new database beside old files must not write over them."""
    folder = home.finetune_output / name / "versions"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)
