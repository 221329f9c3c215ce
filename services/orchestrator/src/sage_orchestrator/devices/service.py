"""Device leases as the inference host asks for them, and the ledger as people see it."""

from __future__ import annotations

from collections.abc import Callable

from sage_contracts.devices import DeviceLease, DeviceState, LeaseReply, LeaseRequest, ReleaseRequest
from sage_contracts.errors import InvalidRequestError
from sage_orchestrator.clock import Clock
from sage_orchestrator.database import Database
from sage_orchestrator.devices import ledger, policy
from sage_orchestrator.devices import repository as devices


class DeviceService:
    def __init__(self, database: Database, clock: Clock, lease_s: float, wake: Callable[[], None]) -> None:
        self._database = database
        self._clock = clock
        self._lease_s = lease_s
        self._wake = wake

    def lease(self, request: LeaseRequest) -> LeaseReply:
        """Grant, renew or resize.

        Raises: DeviceBusyError, naming the holders in the way; InvalidRequestError for what never fits.
        """
        if request.bytes < 0 or request.bytes > request.total_bytes:
            raise InvalidRequestError(
                f"{request.label or request.holder} asks for {request.bytes} bytes of {request.device}, "
                f"which has {request.total_bytes}: choose a smaller model.",
                param="bytes",
            )
        now = self._clock()
        ask = ledger.Ask(
            holder=request.holder,
            purpose=request.purpose,
            device=request.device,
            total_bytes=request.total_bytes,
            bytes=request.bytes,
            label=request.label,
            is_idle=request.is_idle,
        )
        with self._database.write() as session:
            refusal = ledger.take(session, ask, now=now, expires_at=now + self._lease_s)
            if refusal is not None:
                # A refused resize leaves what is held, and the holder has shown that it lives.
                devices.renew(session, request.holder, now + self._lease_s, is_idle=request.is_idle)
            device = devices.lock_device(session, request.device, 0)
            yielding = policy.must_yield(ledger.ledger_of(session, device, now))
        if refusal is not None:
            raise refusal
        return LeaseReply(ttl_s=self._lease_s, must_yield=request.holder in yielding)

    def release(self, request: ReleaseRequest) -> None:
        """Releasing what is not held is fine: it may have expired."""
        with self._database.write() as session:
            ledger.release(session, request.holder, self._clock())
        self._wake()

    def states(self) -> list[DeviceState]:
        now = self._clock()
        states = []
        with self._database.read() as session:
            for device in devices.all_devices(session):
                leases = [
                    DeviceLease(
                        holder=row.holder,
                        purpose="training" if row.purpose == "training" else "inference",
                        bytes=row.bytes,
                        label=row.label,
                        expires_at=row.expires_at,
                        is_idle=row.is_idle,
                    )
                    for row in devices.live_leases(session, device.device, now)
                ]
                states.append(
                    DeviceState(
                        device=device.device,
                        total_bytes=device.total_bytes,
                        leased_bytes=sum(lease.bytes for lease in leases),
                        leases=leases,
                    )
                )
        return states

    def delete_expired(self) -> None:
        with self._database.write() as session:
            devices.delete_expired(session, self._clock())
