"""What has to be said again and again: leases are renewed, the host is alive."""

from __future__ import annotations

import asyncio
import logging
import time

from sage_contracts.errors import ConflictError, DeviceBusyError, NotFoundError, SageError
from sage_contracts.workers import WorkerBeat
from sage_inference.host import Host
from sage_inference.orchestrator import Orchestrator
from sage_inference.records import Engine, YieldOrder
from sage_servicekit.machine import Device
from sage_servicekit.settings import worker_id

logger = logging.getLogger(__name__)

_BEAT_S = 5.0


class Upkeep:
    """Run `run()` in a task beside the host."""

    def __init__(self, host: Host, orchestrator: Orchestrator, device: Device, interval_s: float) -> None:
        self._host = host
        self._orchestrator = orchestrator
        self._device = device
        self._interval_s = interval_s
        self._worker_id = worker_id("inference")
        self._is_heard = True

    async def run(self) -> None:
        """Until cancelled. A silent orchestrator is not this host's end."""
        next_beat = 0.0
        while True:
            try:
                await asyncio.gather(*(self.renew(engine) for engine in self._host.leased_engines()))
                if time.monotonic() >= next_beat:
                    await self._beat()
                    next_beat = time.monotonic() + _BEAT_S
            except Exception:
                # A reply that nobody foresaw must not end the renewals: leases would run out under engines.
                logger.exception("upkeep failed once")
            await asyncio.sleep(self._interval_s)

    async def renew(self, engine: Engine) -> None:
        """Renew one lease, and pass on the order to yield that may come with the reply."""
        request = engine.lease_request(self._device)
        try:
            must_yield = (await self._orchestrator.lease(request)).must_yield
        except (DeviceBusyError, ConflictError, NotFoundError) as error:
            # The lease ran out while we could not be heard, and somebody else has the device now.
            logger.warning("the lease of engine %s is lost: %s", engine.id, error)
            must_yield = True
        except SageError as error:
            logger.debug("the lease of engine %s was not renewed: %s", engine.id, error)
            return
        if not engine.has_lease:
            # It ended while the renewal was under way, which made a new lease that nobody would give back.
            await self._give_back(request.holder)
        elif must_yield:
            self._host.post(YieldOrder(engine))

    async def _give_back(self, holder: str) -> None:
        try:
            await self._orchestrator.release(holder)
        except SageError as error:
            logger.debug("the lease of %s was not given back: %s", holder, error)

    async def _beat(self) -> None:
        status = self._host.status()
        message = WorkerBeat(
            worker_id=self._worker_id,
            kind="inference",
            device=self._device.name,
            device_total_bytes=self._device.total_bytes,
            detail={
                "engine": status.engine_kind,
                "engines": {engine.base_model: engine.state.value for engine in status.engines},
            },
        )
        try:
            await self._orchestrator.beat(message)
            self._is_heard = True
        except SageError as error:
            # Said once per silence, not every five seconds.
            logger.log(logging.WARNING if self._is_heard else logging.DEBUG, "beat not delivered: %s", error)
            self._is_heard = False
