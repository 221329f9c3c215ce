"""The parts of an engine's life that take time. Each runs as a task and reports to the host's loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sage_contracts.errors import EngineFailedError, SageError
from sage_inference import hardware, records
from sage_inference.models import Adapter
from sage_inference.records import Engine, Factory, Ledger, RunningEngine

logger = logging.getLogger(__name__)

# Another program may take a port between our choice and the child's bind: not a fault of the engine.
_PORT_TRIES = 3


class EngineLifetime:
    """Lease, start, watch, stop, give back: in that order, whatever happens on the way."""

    def __init__(self, factory: Factory, ledger: Ledger, post: Callable[[records.Event], None]) -> None:
        self._factory = factory
        self._ledger = ledger
        self._post = post

    async def live(self, engine: Engine) -> None:
        """From the lease to the end of the last process; ends with a Gone event, always."""
        failure: SageError | None = None
        try:
            await self._ledger.lease(engine.lease_request(self._factory.device))
            engine.has_lease = True
            failure = await self._run(engine)
        except SageError as error:
            failure = error
        except Exception as error:
            logger.exception("engine %s could not be run", engine.id)
            failure = EngineFailedError(f"The engine {engine.id} could not be run: {error!r}")
        await self._return_lease(engine)
        self._post(records.Gone(engine, failure))

    async def _run(self, engine: Engine) -> SageError | None:
        used_before = await hardware.gpu_bytes_used(self._factory.device)
        try:
            for _ in range(_PORT_TRIES):
                process = await self._factory.start(engine.plan, used_before)
                engine.process = process
                try:
                    failure = await self._watch(engine, process)
                finally:
                    await process.stop()
                if failure is None or not process.lost_its_port:
                    return failure
                logger.warning("engine %s lost its port to another program: trying another", engine.id)
            return failure
        finally:
            await hardware.wait_memory_back(self._factory.device, used_before)

    async def _watch(self, engine: Engine, process: RunningEngine) -> SageError | None:
        """Until a stop is asked for (None) or the engine ends by itself (why)."""
        stop = asyncio.create_task(engine.stop_requested.wait())
        ready = asyncio.create_task(process.wait_ready())
        exited = asyncio.create_task(process.exited.wait())
        try:
            await asyncio.wait({stop, ready}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return None
            ready.result()
            self._post(records.Ready(engine))
            await asyncio.wait({stop, exited}, return_when=asyncio.FIRST_COMPLETED)
            return None if stop.done() else process.failure("died")
        except SageError as error:
            return error
        finally:
            for task in (stop, ready, exited):
                task.cancel()
            await asyncio.gather(stop, ready, exited, return_exceptions=True)

    async def _return_lease(self, engine: Engine) -> None:
        if not engine.has_lease:
            return
        engine.has_lease = False
        try:
            await self._ledger.release(f"engine:{engine.id}")
        except SageError as error:
            # It expires by itself: nobody renews it any more.
            logger.warning("the lease of engine %s was not given back: %s", engine.id, error)

    async def load(self, engine: Engine, adapter: Adapter) -> None:
        """Ends with an AdapterIn event, always."""
        assert engine.process is not None
        failure: SageError | None = None
        try:
            await engine.process.load_adapter(adapter)
        except SageError as error:
            failure = error
        except Exception as error:
            logger.exception("engine %s could not load %s", engine.id, adapter.name)
            failure = EngineFailedError(f"The engine {engine.id} could not load {adapter.name}: {error!r}")
        self._post(records.AdapterIn(engine, adapter.name, failure))

    async def unload(self, engine: Engine, name: str) -> None:
        """Ends with an AdapterOut event, always."""
        assert engine.process is not None
        try:
            await engine.process.unload_adapter(name)
        except SageError as error:
            logger.warning("engine %s: %s", engine.id, error)
        except Exception:
            logger.exception("engine %s could not unload %s", engine.id, name)
        self._post(records.AdapterOut(engine, name))
