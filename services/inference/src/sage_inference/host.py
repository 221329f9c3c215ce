"""The host of engines: one loop owns all state. Requests ask for a model to be ready; they never check first.

An event is applied, then the policy is asked what each waiting request needs next. What takes time runs in
tasks that report back as events, so nothing here is ever half-changed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

from sage_contracts.errors import DeviceBusyError, EngineFailedError, SageError, ServiceUnavailableError
from sage_contracts.inference import EngineState, HostStatus
from sage_inference import policy, records
from sage_inference.failures import Failures
from sage_inference.lifetime import EngineLifetime
from sage_inference.models import Wanted
from sage_inference.policy import Action, Limits
from sage_inference.records import AdapterSlot, Engine, Factory, Failure, Grant, Ledger, Waiter
from sage_inference.waiting import WaitingRoom

logger = logging.getLogger(__name__)

_TICK_S = 1.0


class Host:
    """Run `run()` in a task; `acquire` is the only way to an engine."""

    def __init__(
        self, factory: Factory, ledger: Ledger, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._factory = factory
        self._lifetime = EngineLifetime(factory, ledger, self.post)
        self._limits = limits
        self._clock = clock
        self._inbox: asyncio.Queue[records.Event] = asyncio.Queue()
        self._engines: dict[str, Engine] = {}
        self._waiting = WaitingRoom()
        self._failures = Failures()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    # What requests call.

    async def acquire(self, wanted: Wanted, session: str = "") -> Grant:
        """Wait until the model is ready and hold it. Cancelling leaves the queue.

        Raises: EngineFailedError, DeviceBusyError, ModelNotFoundError, ServiceUnavailableError.
        """
        waiter = Waiter(wanted, session, asyncio.get_running_loop().create_future())
        self.post(records.Arrived(waiter))
        try:
            return await waiter.future
        except asyncio.CancelledError:
            self.post(records.Left(waiter))
            raise

    def release(self, grant: Grant) -> None:
        """Give a grant back; exactly once, also when the request was cancelled."""
        self.post(records.Released(grant))

    async def end_session(self, wanted: Wanted, session: str, *, may_stop: bool = True) -> bool:
        """The end of a chat: its engine stops if it may and nobody else uses it. Returns whether it does."""
        stopped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.post(records.SessionEnded(wanted.base.location, session, may_stop, stopped))
        return await stopped

    def progress(self, wanted: Wanted) -> str:
        """What a waiting request waits for, for people."""
        engine = self._engines.get(wanted.base.location)
        if engine is None:
            return "waiting for room to start the engine"
        return engine.progress(wanted.label)

    def starting_s(self, wanted: Wanted) -> float:
        """How long the start of its engine has taken so far; 0 where none is being started."""
        engine = self._engines.get(wanted.base.location)
        return engine.starting_s(self._clock()) if engine else 0

    def status(self) -> HostStatus:
        kind = self._factory.kind
        running = [engine.status(kind, self._clock()) for engine in self._engines.values()]
        failed = [
            failure.status(kind)
            for failure in self._failures.latest(self._clock())
            if failure.engine.key not in self._engines
        ]
        return HostStatus(
            device=self._factory.device.name,
            engine_kind=kind,
            keep_alive_s=self._limits.keep_alive_s,
            engines=running + failed,
        )

    def leased_engines(self) -> list[Engine]:
        """Engines that hold memory, for the renewal of their leases."""
        return [engine for engine in self._engines.values() if engine.has_lease]

    def post(self, event: records.Event) -> None:
        """Tell the loop something. Never blocks."""
        self._inbox.put_nowait(event)

    # The loop.

    async def run(self) -> None:
        """Apply events until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    event: records.Event = await self._inbox.get()
            except TimeoutError:
                event = records.Tick()
            try:
                self._apply(event)
                self._schedule()
            except Exception:
                # The one writer must survive its own bugs: the engines need an owner.
                logger.exception("event %r was not applied", type(event).__name__)

    async def close(self) -> None:
        """Refuse what waits, stop every engine and return when no process of any is left."""
        self._is_closing = True
        self._refuse_waiters()
        for engine in self._engines.values():
            self._stop(engine)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _apply(self, event: records.Event) -> None:
        match event:
            case records.Arrived(waiter):
                self._waiting.enter(waiter)
            case records.Left(waiter):
                self._leave(waiter)
            case records.Released(grant):
                grant.give_back(self._clock())
            case records.Ready(engine):
                engine.state = EngineState.STOPPING if engine.stop_requested.is_set() else EngineState.READY
                engine.last_used = self._clock()
                self._failures.resolve(engine.key)
            case records.Gone(engine, failure):
                self._bury(engine, failure)
            case records.AdapterIn(engine, name, failure):
                self._adapter_in(engine, name, failure)
            case records.AdapterOut(engine, name):
                engine.busy -= 1
                engine.slots.pop(name, None)
            case records.YieldOrder(engine):
                engine.must_yield = True
            case records.SessionEnded(key, session, may_stop, stopped):
                is_stopped = self._end_session(key, session, may_stop)
                if not stopped.done():
                    stopped.set_result(is_stopped)
            case records.Tick():
                pass
            case _:
                assert_never(event)

    def _schedule(self) -> None:
        if self._is_closing:
            self._refuse_waiters()
            return
        for waiter in self._waiting:
            wanted = waiter.wanted
            adapter = wanted.adapter.name if wanted.adapter else None
            views = [engine.view() for engine in self._engines.values()]
            decision = policy.decide(wanted.base.location, adapter, wanted.rank, views, self._limits)
            self._carry_out(decision, waiter)
        views = [engine.view() for engine in self._engines.values()]
        for key in policy.to_stop(views, self._waiting.keys(), self._limits, self._clock()):
            self._stop(self._engines[key])

    def _carry_out(self, decision: policy.Decision, waiter: Waiter) -> None:
        match decision.action:
            case Action.GRANT:
                self._grant(waiter)
            case Action.START:
                self._start(waiter)
            case Action.LOAD:
                self._load(waiter)
            case Action.UNLOAD:
                self._unload(self._engines[waiter.wanted.base.location], decision.target)
            case Action.STOP:
                self._stop(self._engines[decision.target])
            case Action.DRAIN:
                self._engines[decision.target].is_draining = True
            case Action.WAIT:
                pass
            case _:
                assert_never(decision.action)

    # Steps of the loop.

    def _grant(self, waiter: Waiter) -> None:
        self._waiting.leave(waiter)
        if waiter.future.done():
            return
        engine, now = self._engines[waiter.wanted.base.location], self._clock()
        assert engine.process is not None
        adapter = waiter.wanted.adapter
        slot = engine.slots[adapter.name] if adapter else None
        if slot is not None:
            slot.busy += 1
        engine.busy += 1
        engine.sessions[waiter.session] = now
        model = adapter.name if adapter else engine.base.served_name
        waiter.future.set_result(Grant(engine, engine.process, model, slot))

    def _leave(self, waiter: Waiter) -> None:
        if waiter in self._waiting:
            self._waiting.leave(waiter)
        elif waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
            # Granted in the same moment in which it was cancelled: nobody else will give it back.
            waiter.future.result().give_back(self._clock())

    def _refuse_waiters(self) -> None:
        self._waiting.fail_all(ServiceUnavailableError("The inference host is shutting down."))

    def _start(self, waiter: Waiter) -> None:
        base = waiter.wanted.base
        gate = self._failures.gate(base.location, self._clock())
        if gate.is_refused:
            self._waiting.fail(waiter, self._failures.refusal(base.location, gate.wait_s))
            return
        if gate.wait_s > 0:
            return
        plan = self._factory.plan(base, self._waiting.highest_rank(base.location))
        engine_id = f"{plan.launch.name}-{secrets.token_hex(3)}"
        engine = Engine(engine_id, base, plan, self._clock())
        self._engines[engine.key] = engine
        self._spawn(self._lifetime.live(engine))

    def _bury(self, engine: Engine, failure: SageError | None) -> None:
        del self._engines[engine.key]
        if failure is None:
            return
        logger.warning("engine %s: %s", engine.id, failure)
        if isinstance(failure, DeviceBusyError):
            views = [other.view() for other in self._engines.values()]
            victim = policy.least_recently_used(views)
            if victim is not None:
                # Our own idle engine is in the way: its memory first, then another try for those who wait.
                self._stop(self._engines[victim])
                return
        elif isinstance(failure, EngineFailedError):
            self._failures.add(Failure(self._clock(), engine, failure))
            if engine.state is EngineState.READY:
                # It worked: those who wait get the next engine, or hear from the gate why there is none.
                return
        self._waiting.fail_engine(engine.key, failure)

    def _load(self, waiter: Waiter) -> None:
        engine, adapter = self._engines[waiter.wanted.base.location], waiter.wanted.adapter
        assert adapter is not None
        engine.slots[adapter.name] = AdapterSlot(last_used=self._clock())
        engine.busy += 1
        self._spawn(self._lifetime.load(engine, adapter))

    def _adapter_in(self, engine: Engine, name: str, failure: SageError | None) -> None:
        engine.busy -= 1
        engine.last_used = self._clock()
        if failure is None:
            engine.slots[name].is_loaded = True
            return
        engine.slots.pop(name, None)
        if not engine.is_dead:
            # When the engine itself is gone, those who wait are served by the next one.
            self._waiting.fail_engine(engine.key, failure, adapter=name)

    def _unload(self, engine: Engine, name: str) -> None:
        engine.slots[name].is_loaded = False
        engine.busy += 1
        self._spawn(self._lifetime.unload(engine, name))

    def _end_session(self, key: str, session: str, may_stop: bool) -> bool:
        engine = self._engines.get(key)
        if engine is None:
            return True
        engine.sessions.pop(session, None)
        since = self._clock() - max(self._limits.keep_alive_s, 1)
        others = [moment for moment in engine.sessions.values() if moment >= since]
        if not may_stop or others or not engine.view().can_stop:
            return False
        self._stop(engine)
        return True

    def _stop(self, engine: Engine) -> None:
        if engine.state is EngineState.READY:
            engine.state = EngineState.STOPPING
        engine.stop_requested.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
