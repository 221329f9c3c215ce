"""The lease ledger inside somebody's transaction: claims of jobs and requests of engines meet here."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from sage_contracts.devices import Purpose
from sage_contracts.errors import DeviceBusyError
from sage_orchestrator.devices import policy
from sage_orchestrator.devices import repository as devices
from sage_orchestrator.jobs import repository as jobs
from sage_orchestrator.rows import DeviceLeaseRow, DeviceRow

# A training that was refused asks again after this; its want outlives a few such rounds, not a dead worker.
RETRY_TRAINING_S = 5.0
WANT_S = 60.0
_RETRY_INFERENCE_S = 15.0
_RETRY_MOST_S = 120.0
_TRAINING_PREFIX = "train:"


@dataclass(frozen=True)
class Ask:
    holder: str
    purpose: Purpose
    device: str
    total_bytes: int
    bytes: int | None
    """None: a training run's usual share of this device."""
    label: str
    is_idle: bool = False
    job_id: str | None = None


def training_holder(job_id: str) -> str:
    return f"{_TRAINING_PREFIX}{job_id}"


def take(session: Session, ask: Ask, *, now: float, expires_at: float) -> DeviceBusyError | None:
    """Grant or resize the lease, or return why not. A refusal is part of the transaction: a training that
    was refused is remembered, so the caller commits and raises afterwards."""
    device = devices.lock_device(session, ask.device, ask.total_bytes)
    # What expired must not come back to life by a renewal: its room may be somebody else's now.
    devices.delete_expired(session, now)
    wanted_bytes = (
        ask.bytes if ask.bytes is not None else policy.training_bytes(ask.device, device.total_bytes)
    )
    ledger = ledger_of(session, device, now)
    holding = policy.Holding(ask.holder, ask.purpose, wanted_bytes, ask.label, ask.is_idle)
    verdict = policy.judge(ledger, holding)
    if not verdict.is_granted:
        if ask.purpose == "training" and ledger.want is None:
            device.wanted_by, device.wanted_label = ask.holder, ask.label
            device.wanted_bytes, device.wanted_until = wanted_bytes, now + WANT_S
        elif ledger.want is not None and ledger.want.holder == ask.holder:
            device.wanted_until = now + WANT_S
        return _busy(session, ask, verdict)
    _grant(session, ask, wanted_bytes, now=now, expires_at=expires_at)
    if device.wanted_by == ask.holder:
        device.wanted_by, device.wanted_label = None, None
        device.wanted_bytes, device.wanted_until = 0, None
    return None


def release(session: Session, holder: str, now: float) -> None:
    """Give back what the holder has and no longer wait for more."""
    devices.forget_want(session, holder)
    device = devices.release(session, holder)
    waiting = None if device is None else devices.wanted_by(session, device)
    if waiting is not None:
        # Its worker may have left empty-handed: ring rather than let the room stay empty.
        jobs.ring_queued(session, waiting.removeprefix(_TRAINING_PREFIX), now)


def ledger_of(session: Session, device: DeviceRow, now: float) -> policy.Ledger:
    want = None
    if device.wanted_by is not None and (device.wanted_until or 0) > now:
        want = policy.Want(device.wanted_by, device.wanted_bytes, device.wanted_label or "")
    held = tuple(
        policy.Holding(row.holder, "training" if row.purpose == "training" else "inference", row.bytes,
                       row.label, row.is_idle)
        for row in devices.live_leases(session, device.device, now)
    )  # fmt: skip
    return policy.Ledger(device.total_bytes, held, want)


def _grant(session: Session, ask: Ask, granted_bytes: int, *, now: float, expires_at: float) -> None:
    row = devices.lease_of(session, ask.holder)
    if row is None:
        row = DeviceLeaseRow(holder=ask.holder, granted_at=now)
        session.add(row)
    row.device, row.purpose, row.bytes = ask.device, ask.purpose, granted_bytes
    row.label, row.is_idle, row.expires_at, row.job_id = ask.label, ask.is_idle, expires_at, ask.job_id
    session.flush()


def _busy(session: Session, ask: Ask, verdict: policy.Verdict) -> DeviceBusyError:
    if not verdict.blockers:
        return DeviceBusyError(
            f"{ask.label or ask.holder} needs more memory than {ask.device} has: choose a smaller model or "
            "preset.",
            retry_after_s=_RETRY_MOST_S,
        )
    names = ", ".join(blocker.label or blocker.holder for blocker in verdict.blockers)
    if ask.purpose == "training":
        return DeviceBusyError(f"device busy: {names}, waiting", retry_after_s=RETRY_TRAINING_S)
    eta_s = _longest_eta_s(session, verdict)
    if eta_s is None:
        return DeviceBusyError(f"device busy: {names}", retry_after_s=_RETRY_INFERENCE_S)
    minutes = max(1, round(eta_s / 60))
    return DeviceBusyError(
        f"device busy: {names}, about {minutes} min", retry_after_s=min(max(eta_s, 1.0), _RETRY_MOST_S)
    )


def _longest_eta_s(session: Session, verdict: policy.Verdict) -> float | None:
    etas = [
        eta_s
        for blocker in verdict.blockers
        if (eta_s := jobs.eta_s(session, blocker.holder.removeprefix(_TRAINING_PREFIX))) is not None
    ]
    return max(etas, default=None)
