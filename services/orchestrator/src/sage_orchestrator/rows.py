"""The whole schema. Times are seconds since the epoch; paths inside SAGE_HOME are relative to it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only in a column of exactly INTEGER.
_Sequence = BigInteger().with_variant(Integer, "sqlite")

Json = dict[str, Any]


class StorableText(TypeDecorator[str]):
    """A NUL, which PostgreSQL cannot hold, becomes U+FFFD: text is kept, and an id with one is nobody's."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, _: Dialect) -> str | None:
        return value.replace("\0", "\ufffd") if value else value


class Base(DeclarativeBase):
    type_annotation_map = {str: StorableText, Json: JSON, list[Json]: JSON}  # noqa: RUF012


class FileRow(Base):
    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    purpose: Mapped[str] = mapped_column(index=True)
    """`deleted` for the place of a file that is gone."""
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    path: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """When the file goes; of a place that is kept, when that does."""


class UploadRow(Base):
    """A file that comes in parts."""

    __tablename__ = "uploads"

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    """Of the whole file, as announced."""
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of all its parts; never above `size_bytes`."""
    status: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]
    file_lifetime_s: Mapped[int | None]
    file_id: Mapped[str | None]
    """Set by completion."""


class UploadPartRow(Base):
    """Bytes of an unfinished upload; they lie in the home's `file_parts`, named by id."""

    __tablename__ = "upload_parts"
    __table_args__ = (UniqueConstraint("upload_id", "sha256"),)

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    sha256: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    times_sent: Mapped[int] = mapped_column(default=1)
    """The same bytes again are the same part: a repetition, or a file in which they occur again."""
    created_at: Mapped[float]


class LeasedWork:
    """Columns of work that one worker at a time holds by lease; `attempt` is the fencing token."""

    status: Mapped[str] = mapped_column(index=True)
    attempt: Mapped[int] = mapped_column(default=0)
    lost_attempts: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None]
    claim_id: Mapped[str | None]
    """Of the request that the newest attempt was claimed with."""
    lease_expires_at: Mapped[float | None]
    ring_at: Mapped[float | None]
    """When the doorbell is due; None: nobody has to be woken."""
    rings: Mapped[int] = mapped_column(default=0)
    """Doorbells since the work was last queued."""
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class JobRow(LeasedWork, Base):
    __tablename__ = "jobs"

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str] = mapped_column(index=True)
    version: Mapped[int | None]
    """Reserved at the first claim and kept over attempts."""
    task: Mapped[str]
    preset: Mapped[str | None]
    model: Mapped[str]
    config: Mapped[Json]
    """TrainingConfig, resolved once at submit."""
    training_file: Mapped[str | None]
    validation_file: Mapped[str | None]
    hyperparameters: Mapped[Json]
    method: Mapped[Json]
    labels: Mapped[Json | None]
    """The caller's `metadata`; that name is taken on a declarative class."""
    integrations: Mapped[list[Json] | None]
    pending_order: Mapped[str]
    """What the running attempt is told with its next report."""
    metrics: Mapped[Json]
    error: Mapped[Json | None]
    fine_tuned_model: Mapped[str | None]
    events_heard: Mapped[int | None]
    """The highest number among the events of the newest attempt: what comes again is known."""
    checks_begun: Mapped[int | None]
    """How often the check of its files was begun and did not end."""
    result_file: Mapped[str | None]
    """The id of the file with its step metrics; set by success."""
    waiting_for: Mapped[str | None]
    """The last "device busy" shown, so that a waiting job says it once."""


class EventRow(Base):
    __tablename__ = "job_events"
    # One job's events are always read in order.
    __table_args__ = (Index("ix_job_events_job_id_seq", "job_id", "seq"),)

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    message: Mapped[str]
    type: Mapped[str]
    data: Mapped[Json | None]


class CheckpointRow(Base):
    __tablename__ = "job_checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    step: Mapped[int]
    path: Mapped[str]
    train_loss: Mapped[float | None]
    eval_loss: Mapped[float | None]


class ModelRow(Base):
    """A name users know. `last_version` only grows: a number is never given twice."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    last_version: Mapped[int] = mapped_column(default=0)
    alias_version: Mapped[int | None]
    """What the bare name means now; None until a version is registered."""


class VersionRow(Base):
    __tablename__ = "model_versions"

    name: Mapped[str] = mapped_column(ForeignKey("models.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    task: Mapped[str | None]
    job_id: Mapped[str | None]
    base_model: Mapped[str]
    adapter_path: Mapped[str]
    merged_path: Mapped[str | None]
    lora_rank: Mapped[int]
    base_eval_loss: Mapped[float | None]
    eval_loss: Mapped[float | None]
    meta: Mapped[Json]


class MergeRow(LeasedWork, Base):
    __tablename__ = "merges"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[int]
    dtype: Mapped[str]
    format: Mapped[str]
    content: Mapped[str]
    repo: Mapped[str | None]
    allow_public: Mapped[bool | None]
    """Whether the repository may be one that everybody can read."""
    output_dir: Mapped[str]
    phase: Mapped[str | None]
    result_path: Mapped[str | None]
    report: Mapped[Json | None]
    error: Mapped[str | None]


class SweepRow(Base):
    """One request over a grid; its jobs are in SweepPointRow."""

    __tablename__ = "sweeps"

    seq: Mapped[int] = mapped_column(_Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    task: Mapped[str]
    model: Mapped[str]
    grid: Mapped[Json]
    status: Mapped[str] = mapped_column(index=True)
    is_cancelling: Mapped[bool]
    """Its owner gave it up; jobs that nobody has stopped yet are to be."""
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    fine_tuned_model: Mapped[str | None]


class SweepPointRow(Base):
    """Which job trains which point. Jobs themselves know of no sweep."""

    __tablename__ = "sweep_points"

    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """From 1: the job's name ends in it."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    point: Mapped[Json]


class DeviceRow(Base):
    """One device, and the training that waits for room on it."""

    __tablename__ = "devices"

    device: Mapped[str] = mapped_column(primary_key=True)
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    wanted_by: Mapped[str | None]
    wanted_label: Mapped[str | None]
    wanted_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    wanted_until: Mapped[float | None]


class DeviceLeaseRow(Base):
    __tablename__ = "device_leases"

    holder: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), index=True)
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    label: Mapped[str]
    is_idle: Mapped[bool]
    expires_at: Mapped[float]
    job_id: Mapped[str | None]
    """Set for a running job: such a lease ends with the job's attempt, not by time."""
    granted_at: Mapped[float]


class WorkerRow(Base):
    __tablename__ = "workers"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    device: Mapped[str]
    device_total_bytes: Mapped[int] = mapped_column(BigInteger)
    device_free_bytes: Mapped[int | None] = mapped_column(BigInteger)
    detail: Mapped[Json]
    first_seen: Mapped[float]
    last_seen: Mapped[float]
