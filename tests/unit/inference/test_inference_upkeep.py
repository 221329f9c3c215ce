"""What a renewal does that comes too early, too late, or to somebody else."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tests.fakes.memory_engine import MemoryFactory, base
from tests.fakes.model_registry import Registry

from sage_inference.host import Host
from sage_inference.models import Wanted
from sage_inference.orchestrator import Orchestrator
from sage_inference.policy import Limits
from sage_inference.upkeep import Upkeep

BASE = Wanted(base())


class Slow(Registry):
    """A renewal is answered when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def lease(self, request: Any) -> Any:
        await self.may_answer.wait()
        return await super().lease(request)


async def test_a_renewal_that_crosses_an_engines_end_leaves_no_lease() -> None:
    registry, factory, now = Slow(), MemoryFactory(), [0.0]
    host = Host(factory, registry, Limits(2, 2, keep_alive_s=300), clock=lambda: now[0])
    upkeep = Upkeep(host, cast(Orchestrator, registry), factory.device, interval_s=1)
    loop = asyncio.create_task(host.run())
    host.release(await host.acquire(BASE))
    [engine] = host.leased_engines()
    registry.may_answer.clear()
    renewal = asyncio.create_task(upkeep.renew(engine))
    await asyncio.sleep(0)
    await host.close()
    assert registry.leases == {} and not engine.has_lease
    registry.may_answer.set()
    await renewal
    assert registry.leases == {}
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_an_engine_whose_device_went_to_somebody_else_is_told_to_yield() -> None:
    registry, factory = Registry(), MemoryFactory()
    host = Host(factory, registry, Limits(2, 2, keep_alive_s=300))
    upkeep = Upkeep(host, cast(Orchestrator, registry), factory.device, interval_s=1)
    loop = asyncio.create_task(host.run())
    host.release(await host.acquire(BASE))
    registry.leases.clear()
    registry.busy_with = "training code"
    [engine] = host.leased_engines()
    await upkeep.renew(engine)
    async with asyncio.timeout(5):
        while host.leased_engines():  # noqa: ASYNC110 (the host's state has no event)
            await asyncio.sleep(0)
    await host.close()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
