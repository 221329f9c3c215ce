"""What the gateway counts where an answer did not come as it should."""

from __future__ import annotations

from pathlib import Path

import httpx

from sage_chat.backend import BackendName, ChatCall, Reply
from sage_chat.mock import MockBackend
from sage_gateway.chat import Chat, make_router
from sage_gateway.directory import ModelDirectory
from sage_gateway.measures import ChatMeasures
from sage_retrieval.store import IndexStore
from sage_servicekit.app import create_app
from sage_servicekit.settings import ServiceSettings

BODY = b'{"model": "mock", "messages": [{"role": "user", "content": "Hi"}]}'


class Failing(MockBackend):
    async def stream(self, call: ChatCall) -> Reply:
        raise TypeError("nobody expected it")


async def test_what_nobody_expected_is_no_client_that_left(tmp_path: Path) -> None:
    app = create_app("gateway", ServiceSettings(home_dir=tmp_path))
    backends = dict.fromkeys(BackendName, Failing())
    directory = ModelDirectory(backends, default_model="mock", tuned_cache_s=1, served_cache_s=1)
    measures = ChatMeasures(app.state.metrics_registry)
    store = IndexStore(tmp_path, tmp_path)
    app.include_router(make_router(Chat(backends, directory, store, measures, 1, 1)))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        assert (await client.post("/v1/chat/completions", content=BODY)).status_code == 500
        metrics = (await client.get("/metrics")).text
    assert 'sage_chat_answers_total{backend="mock",status="500"} 1.0' in metrics
    assert 'status="499"' not in metrics
