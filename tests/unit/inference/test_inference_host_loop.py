"""The host's loop with engines in memory and a clock in the test's hand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio
from tests.fakes.memory_engine import MemoryFactory, base
from tests.fakes.model_registry import Registry
from tests.fakes.nvidia_smi import Card, install

from sage_contracts.errors import DeviceBusyError, EngineFailedError, InvalidRequestError, SageError
from sage_contracts.inference import EngineState
from sage_inference import hardware
from sage_inference.host import Host
from sage_inference.models import Adapter, Wanted
from sage_inference.policy import CRASH_WINDOW_S, Limits
from sage_inference.records import Tick, YieldOrder
from sage_servicekit.machine import Device

BASE = Wanted(base())
CODE = Wanted(base(), Adapter("code@1", Path("/adapters/code"), 8))
OTHER = Wanted(base("other"))


@dataclass
class World:
    now: float = 0
    factory: MemoryFactory = field(default_factory=MemoryFactory)
    ledger: Registry = field(default_factory=Registry)
    limits: Limits = field(default_factory=lambda: Limits(2, 2, keep_alive_s=300))

    def __post_init__(self) -> None:
        self.host = Host(self.factory, self.ledger, self.limits, clock=lambda: self.now)

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.host.post(Tick())
        await self.settle()

    async def settle(self) -> None:
        """Let everything run that does not wait for the test."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not what():  # noqa: ASYNC110 (the condition is about the host's state, which has no event)
                await asyncio.sleep(0)

    @property
    def states(self) -> list[EngineState]:
        return [engine.state for engine in self.host.status().engines]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    loop = asyncio.create_task(made.host.run())
    yield made
    for engine in made.factory.engines:
        engine.may_load.set()
    await made.host.close()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert all(engine.stops == 1 for engine in made.factory.engines)
    assert made.ledger.leases == {}


async def test_concurrent_requests_join_one_start(world: World) -> None:
    world.factory.starts_ready = False
    waiting = [asyncio.create_task(world.host.acquire(wanted)) for wanted in (BASE, CODE, CODE)]
    await world.until(lambda: world.factory.engines)
    await world.settle()
    assert world.host.progress(CODE) == "starting engine (loading weights)"
    await world.pass_time(95)
    assert world.host.starting_s(CODE) == 95 and world.host.starting_s(OTHER) == 0
    world.factory.engines[0].is_ready.set()
    grants = await asyncio.gather(*waiting)
    assert [grant.model for grant in grants] == ["base:tiny", "code@1", "code@1"]
    assert len(world.factory.engines) == 1
    assert world.factory.engines[0].loaded == ["code@1"]


async def test_a_cancelled_waiter_leaves_and_the_others_are_served(world: World) -> None:
    world.factory.starts_ready = False
    leaver, stayer = (asyncio.create_task(world.host.acquire(CODE)) for _ in range(2))
    await world.until(lambda: world.factory.engines)
    leaver.cancel()
    world.factory.engines[0].is_ready.set()
    grant = await stayer
    await world.settle()
    assert world.host.status().engines[0].busy_requests == 1
    world.host.release(grant)
    await world.settle()
    assert world.host.status().engines[0].busy_requests == 0


async def test_a_grant_that_meets_its_cancellation_is_given_back(world: World) -> None:
    world.host.release(await world.host.acquire(BASE))
    for turns in range(12):
        task = asyncio.create_task(world.host.acquire(BASE))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        if not isinstance(result, BaseException):
            world.host.release(result)
        await world.settle()
        assert world.host.status().engines[0].busy_requests == 0


async def test_an_idle_engine_is_stopped_after_its_time_and_a_busy_one_is_not(world: World) -> None:
    grant = await world.host.acquire(BASE)
    await world.pass_time(1000)
    assert world.states == [EngineState.READY]
    world.host.release(grant)
    await world.settle()
    await world.pass_time(299)
    assert world.states == [EngineState.READY]
    await world.pass_time(2)
    assert world.states == [] and world.ledger.leases == {}


async def test_a_failed_start_tells_all_who_wait_and_the_third_refuses_without_trying(world: World) -> None:
    world.factory.starts_ready = False
    for attempt in range(1, 4):
        waiting = [asyncio.create_task(world.host.acquire(BASE)) for _ in range(2)]
        await world.settle()
        await world.pass_time(11)
        await world.until(lambda attempt=attempt: len(world.factory.engines) == attempt)
        world.factory.engines[-1].fail(EngineFailedError("weights are damaged"))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in errors] == ["weights are damaged"] * 2
    with pytest.raises(EngineFailedError, match="weights are damaged — it failed 3 times") as refusal:
        await world.host.acquire(BASE)
    assert refusal.value.retry_after_s is not None
    assert len(world.factory.engines) == 3
    assert world.states == [EngineState.FAILED]
    await world.pass_time(CRASH_WINDOW_S)
    world.factory.starts_ready = True
    world.host.release(await world.host.acquire(BASE))


async def test_a_crash_is_followed_by_a_new_engine_after_a_pause(world: World) -> None:
    world.host.release(await world.host.acquire(CODE))
    world.factory.engines[0].exited.set()
    waiting = asyncio.create_task(world.host.acquire(CODE))
    await world.settle()
    assert not waiting.done() and len(world.factory.engines) == 1
    await world.pass_time(2)
    world.host.release(await waiting)
    assert world.factory.engines[1].loaded == ["code@1"]


async def test_a_failure_is_shown_until_the_next_engine_is_ready_and_counts_beyond(world: World) -> None:
    async def crash() -> None:
        world.host.release(await world.host.acquire(BASE))
        world.factory.engines[-1].exited.set()
        await world.until(lambda: world.states == [EngineState.FAILED])
        await world.pass_time(11)

    for _ in range(2):
        await crash()
        world.host.release(await world.host.acquire(BASE))
        await world.host.end_session(BASE, "")
        await world.until(lambda: world.states == [])
    await crash()
    with pytest.raises(EngineFailedError, match="it failed 3 times"):
        await world.host.acquire(BASE)


async def test_the_ledgers_refusal_reaches_the_client_and_is_no_crash(world: World) -> None:
    world.ledger.busy_with = "training code"
    for _ in range(4):
        with pytest.raises(DeviceBusyError, match="training code"):
            await world.host.acquire(BASE)
    world.ledger.busy_with = ""
    world.host.release(await world.host.acquire(BASE))


async def test_our_own_idle_engine_gives_way_when_the_device_is_full(world: World) -> None:
    world.ledger.capacity = 1
    world.host.release(await world.host.acquire(BASE))
    world.host.release(await world.host.acquire(OTHER))
    assert [engine.base_model for engine in world.host.status().engines] == ["base:other"]


async def test_a_busy_engine_does_not_give_way(world: World) -> None:
    world.ledger.capacity = 1
    grant = await world.host.acquire(BASE)
    with pytest.raises(DeviceBusyError):
        await world.host.acquire(OTHER)
    world.host.release(grant)


async def test_a_yield_order_waits_for_the_last_request_and_then_asks_the_ledger_again(world: World) -> None:
    grant = await world.host.acquire(BASE)
    world.host.post(YieldOrder(grant.engine))
    world.ledger.busy_with = "training code"
    await world.settle()
    assert world.states == [EngineState.READY]
    world.host.release(grant)
    await world.settle()
    assert world.states == []
    with pytest.raises(DeviceBusyError):
        await world.host.acquire(BASE)


async def test_a_refused_adapter_fails_its_requests_only(world: World) -> None:
    world.host.release(await world.host.acquire(BASE))
    world.factory.engines[0].load_error = InvalidRequestError("no such layer")
    with pytest.raises(SageError, match="no such layer"):
        await world.host.acquire(CODE)
    world.host.release(await world.host.acquire(BASE))
    assert len(world.factory.engines) == 1


async def test_a_load_that_breaks_unforeseen_is_told_and_holds_no_engine(world: World) -> None:
    world.host.release(await world.host.acquire(BASE))
    world.factory.engines[0].load_error = RuntimeError("the client has been closed")
    waiting = asyncio.create_task(world.host.acquire(CODE))
    await world.settle()
    assert waiting.done()
    with pytest.raises(EngineFailedError, match=r"could not load code@1: .*has been closed"):
        await waiting
    await world.pass_time(301)
    assert world.states == []


async def test_an_unload_that_breaks_unforeseen_holds_no_engine(world: World) -> None:
    one, two, three = (Wanted(base(), Adapter(f"code@{n}", Path("/adapters"), 8)) for n in (1, 2, 3))
    for wanted in (one, two):
        world.host.release(await world.host.acquire(wanted))
    world.factory.engines[0].loaded.clear()  # the engine cannot unload what room is to be made with
    waiting = asyncio.create_task(world.host.acquire(three))
    await world.settle()
    assert waiting.done()
    world.host.release(await waiting)
    await world.settle()
    await world.pass_time(301)
    assert world.states == []


async def test_an_engine_that_dies_while_it_loads_an_adapter_is_replaced(world: World) -> None:
    world.host.release(await world.host.acquire(BASE))
    first = world.factory.engines[0]
    first.may_load.clear()
    waiting = asyncio.create_task(world.host.acquire(CODE))
    await world.settle()
    first.load_error = EngineFailedError("connection refused")
    first.exited.set()
    first.may_load.set()
    await world.settle()
    await world.pass_time(3)
    world.host.release(await waiting)
    assert world.factory.engines[1].loaded == ["code@1"]


async def test_the_end_of_one_chat_never_stops_anothers_engine(world: World) -> None:
    for session in ("anna", "ben"):
        world.host.release(await world.host.acquire(CODE, session))
    assert not await world.host.end_session(CODE, "anna")
    grant = await world.host.acquire(CODE, "ben")
    assert not await world.host.end_session(CODE, "ben")
    world.host.release(grant)
    assert await world.host.end_session(CODE, "ben")
    await world.settle()
    assert world.states == []
    assert await world.host.end_session(CODE, "ben")


async def test_a_larger_rank_waits_for_the_engine_to_be_free_and_newcomers_queue_behind(world: World) -> None:
    big = Wanted(base(), Adapter("big@1", Path("/adapters/big"), 64))
    grant = await world.host.acquire(BASE)
    wants_big, newcomer = (asyncio.create_task(world.host.acquire(wanted)) for wanted in (big, BASE))
    await world.settle()
    assert not wants_big.done() and not newcomer.done()
    world.host.release(grant)
    for task in (wants_big, newcomer):
        world.host.release(await task)
    assert [plan.max_rank for plan in world.factory.plans] == [16, 64]


async def test_closing_refuses_those_who_wait(world: World) -> None:
    world.factory.starts_ready = False
    waiting = asyncio.create_task(world.host.acquire(BASE))
    await world.until(lambda: world.factory.engines)
    await world.host.close()
    with pytest.raises(SageError, match="shutting down"):
        await waiting
    with pytest.raises(SageError, match="shutting down"):
        await world.host.acquire(BASE)


async def test_a_lease_is_held_until_the_memory_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver frees what a dead process had a moment after it: nobody else is let in before."""
    card = Card("GPU-1", total_mib=24_000, used_mib=1_000)
    monkeypatch.setenv("PATH", f"{install(tmp_path, card)}:{os.environ['PATH']}")
    device = Device("cuda:0", 24_000 << 20)
    world = World(factory=MemoryFactory(device=device))
    loop = asyncio.create_task(world.host.run())
    world.host.release(await world.host.acquire(BASE))
    install(tmp_path, replace(card, used_mib=9_000))
    closing = asyncio.create_task(world.host.close())
    await world.until(lambda: world.factory.engines[0].stops)
    for _ in range(2):  # as long as the first look at the card takes, and then some
        await hardware.gpu_bytes_used(device)
        await world.settle()
    assert len(world.ledger.leases) == 1
    install(tmp_path, card)
    await closing
    assert world.ledger.leases == {}
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
