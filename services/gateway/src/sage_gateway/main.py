"""The composition root of the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from sage_chat.build import build_backends
from sage_chat.upstream import make_client
from sage_contracts.uploads import UPLOAD_PATHS
from sage_gateway import chat, indexes, models, proxy, responses, status
from sage_gateway.directory import ModelDirectory
from sage_gateway.keys import key_check
from sage_gateway.measures import ChatMeasures
from sage_gateway.settings import GatewaySettings
from sage_retrieval.store import IndexStore
from sage_servicekit import logs, serve
from sage_servicekit.app import create_app
from sage_servicekit.settings import from_env


def build_app(settings: GatewaySettings) -> FastAPI:
    """Everything wired; nothing is connected before the first request."""
    client = make_client()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    admit = key_check(settings.api_keys)
    app = create_app("gateway", settings, lifespan, uploads=UPLOAD_PATHS, admit=admit)
    addresses = settings.addresses
    backends = build_backends(client, addresses)
    directory = ModelDirectory(
        backends,
        default_model=settings.default_model,
        tuned_cache_s=settings.tuned_cache_s,
        served_cache_s=settings.served_cache_s,
    )
    store = IndexStore(settings.home.indexes, settings.docs_dir)
    orchestrator = proxy.Proxy(client, "orchestrator", addresses.orchestrator_url)
    inference = proxy.Proxy(client, "inference", addresses.inference_url)
    endpoints = chat.Chat(
        backends=backends,
        directory=directory,
        indexes=store,
        measures=ChatMeasures(app.state.metrics_registry),
        passages=settings.default_passages,
        passages_max_bytes=settings.passages_max_bytes,
    )
    for router in (
        chat.make_router(endpoints),
        responses.make_router(endpoints),
        models.make_router(directory, orchestrator),
        indexes.make_router(store),
        status.make_router(status.StackProbe(client, settings)),
        proxy.make_router(orchestrator, inference),
    ):
        app.include_router(router)
    return app


def main() -> None:
    settings = from_env(GatewaySettings)
    logs.configure("gateway", settings.log_level)
    serve.run(build_app(settings), settings.host, settings.gateway_port)
