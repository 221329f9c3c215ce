"""Composition root of the inference host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI

from sage_inference import process_group
from sage_inference.endpoints import make_router
from sage_inference.engines import EngineFactory, choose_kind
from sage_inference.finder import Finder
from sage_inference.host import Host
from sage_inference.orchestrator import Orchestrator
from sage_inference.policy import Limits
from sage_inference.settings import InferenceSettings
from sage_inference.upkeep import Upkeep
from sage_servicekit import logs, serve
from sage_servicekit.app import create_app
from sage_servicekit.machine import find_device
from sage_servicekit.settings import from_env

logger = logging.getLogger(__name__)


def build_app(settings: InferenceSettings) -> FastAPI:
    """The app; engines are started by its first requests and ended by its shutdown."""
    device = find_device(settings.device)
    factory = EngineFactory(settings, choose_kind(settings), device)
    orchestrator = Orchestrator(settings)
    limits = Limits(settings.max_engines, settings.max_cpu_loras, settings.keep_alive_s)
    host = Host(factory, orchestrator, limits)
    upkeep = Upkeep(host, orchestrator, device, settings.beat_interval_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await process_group.end_leftovers(factory.records, settings.engine_stop_grace_s)
        logger.info("engines: %s on %s", factory.kind, device.name)
        tasks = [asyncio.create_task(host.run()), asyncio.create_task(upkeep.run())]
        try:
            yield
        finally:
            await host.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await orchestrator.close()

    app = create_app("inference", settings, lifespan)
    finder = Finder(orchestrator, settings.home, factory.kind)
    app.include_router(make_router(host, orchestrator, finder, settings, factory.kind))
    return app


def main() -> None:
    settings = from_env(InferenceSettings)
    logs.configure("inference", settings.log_level)
    serve.run(build_app(settings), settings.host, settings.chat_finetune_port, graceful_shutdown_s=3)
