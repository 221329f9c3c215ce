"""What GET /v1/sage/status says of the broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from sage_contracts.status import PartStatus
from sage_gateway.settings import GatewaySettings
from sage_gateway.status import StackProbe

NOWHERE = "http://127.0.0.1:1"
TLS_HANDSHAKE = 0x16
"""The first byte of whoever begins to speak TLS. Source: RFC 8446, 5.1."""


@dataclass
class Broker:
    """A server that says one thing to whoever speaks to it, and keeps what it heard."""

    answer: bytes
    heard: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append(await reader.read(100))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(broker: Broker) -> AsyncIterator[int]:
    server = await asyncio.start_server(broker.serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def redis_part(home: Path, broker_url: str) -> PartStatus | None:
    settings = GatewaySettings(
        home_dir=home, broker_url=broker_url, orchestrator_url=NOWHERE, inference_url=NOWHERE
    )
    async with httpx.AsyncClient() as client:
        parts = (await StackProbe(client, settings).status()).parts
    return next((part for part in parts if part.name == "redis"), None)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (b"+PONG\r\n", "up"),
        (b"-NOAUTH Authentication required.\r\n", "up"),
        (b"HTTP/1.1 400 Bad Request\r\n", "down"),
        (b"", "down"),
    ],
)
async def test_a_redis_is_asked_whether_it_answers(tmp_path: Path, answer: bytes, state: str) -> None:
    broker = Broker(answer)
    async with listening(broker) as port:
        part = await redis_part(tmp_path, f"redis://127.0.0.1:{port}/0")
    assert part is not None and part.state == state
    assert broker.heard == [b"PING\r\n"]


async def test_a_redis_over_tls_is_spoken_to_in_tls(tmp_path: Path) -> None:
    broker = Broker(b"+PONG\r\n")  # in the clear: no such server
    async with listening(broker) as port:
        part = await redis_part(tmp_path, f"rediss://127.0.0.1:{port}/0")
    assert part is not None and part.state == "down"
    assert broker.heard[0][0] == TLS_HANDSHAKE


@pytest.mark.parametrize("url", ["filesystem://", "redis+socket:///run/redis.sock", "sentinel://127.0.0.1:1"])
async def test_other_brokers_are_no_part_that_is_down(tmp_path: Path, url: str) -> None:
    assert await redis_part(tmp_path, url) is None
