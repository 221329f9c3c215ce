"""GET /v1/sage/status: every part of the stack, asked at the same time, within one deadline."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter
from pydantic import ValidationError

from sage_contracts.paging import ListPage
from sage_contracts.status import PartStatus, StackStatus
from sage_contracts.workers import WorkerSeen
from sage_gateway.settings import GatewaySettings

_DEADLINE_S = 2.0
_WORKERS = ("trainer", "merger")
_REDIS_SCHEMES = ("redis", "rediss")
"""The second is Redis over TLS. Of other brokers nothing is asked."""


@dataclass(slots=True)
class StackProbe:
    """Asks the parts that the settings name."""

    client: httpx.AsyncClient
    settings: GatewaySettings

    async def status(self) -> StackStatus:
        """Never raises: a part that does not answer is down, and says why."""
        addresses = self.settings.addresses
        singles: list[Coroutine[Any, Any, PartStatus]] = [
            self._http("orchestrator", f"{addresses.orchestrator_url}/healthz"),
            self._http("inference", f"{addresses.inference_url}/healthz", self._engines),
        ]
        if self.settings.tensorboard_url:
            singles.append(self._http("tensorboard", self.settings.tensorboard_url))
        if urlsplit(self.settings.broker_url).scheme in _REDIS_SCHEMES:
            singles.append(_redis(self.settings.broker_url))
        workers, *parts = await asyncio.gather(self._worker_parts(), *singles)
        gateway = PartStatus(name="gateway", state="up", detail={"url": self.settings.own_url})
        return StackStatus(parts=[gateway, *parts, *workers])

    async def _http(self, name: str, url: str, describe: Any = None) -> PartStatus:
        try:
            async with asyncio.timeout(_DEADLINE_S):
                response = await self.client.get(url)
                detail = {"url": url.removesuffix("/healthz")}
                if response.is_error:
                    return _down(name, f"HTTP {response.status_code} from {url}")
                if describe is not None:
                    detail |= await describe()
                return PartStatus(name=name, state="up", detail=detail)
        except (httpx.HTTPError, TimeoutError) as error:
            return _down(name, f"{url} does not answer: {str(error) or type(error).__name__}")

    async def _engines(self) -> dict[str, Any]:
        try:
            response = await self.client.get(f"{self.settings.addresses.inference_url}/v1/sage/engines")
            answer = response.json() if response.is_success else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _worker_parts(self) -> list[PartStatus]:
        """Trainer and merger speak to the orchestrator only; it knows when it last heard them."""
        url = f"{self.settings.addresses.orchestrator_url}/internal/workers"
        try:
            async with asyncio.timeout(_DEADLINE_S):
                response = await self.client.get(url, headers=self.settings.internal_headers)
                response.raise_for_status()
                seen = ListPage[WorkerSeen].model_validate_json(response.content).data
        except (httpx.HTTPError, ValidationError, TimeoutError) as error:
            why = f"the orchestrator cannot be asked: {str(error) or type(error).__name__}"
            return [_down(kind, why) for kind in _WORKERS]
        return [_worker(kind, [worker for worker in seen if worker.kind == kind]) for kind in _WORKERS]


def _worker(kind: str, seen: list[WorkerSeen]) -> PartStatus:
    alive = [worker for worker in seen if worker.is_up]
    if alive:
        newest = max(alive, key=lambda worker: worker.last_seen)
        detail = {"workers": len(alive), "worker_id": newest.worker_id, "device": newest.device}
        return PartStatus(name=kind, state="up", detail=detail | newest.detail)
    if not seen:
        return _down(kind, "no worker has been heard of")
    silent_s = time.time() - max(worker.last_seen for worker in seen)
    return _down(kind, f"last heard {max(0.0, silent_s):.0f} s ago")


async def _redis(url: str) -> PartStatus:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 6379
    try:
        async with asyncio.timeout(_DEADLINE_S):
            tls = _trusting() if parts.scheme == "rediss" else None
            reader, writer = await asyncio.open_connection(host, port, ssl=tls)
            try:
                writer.write(b"PING\r\n")
                await writer.drain()
                answer = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        return _down("redis", f"{host}:{port} does not answer: {str(error) or type(error).__name__}")
    # A server that asks for a password is alive too.
    state: Literal["up", "down"] = "up" if answer.startswith((b"+PONG", b"-NOAUTH")) else "down"
    return PartStatus(name="redis", state=state, detail={"address": f"{host}:{port}"})


def _trusting() -> ssl.SSLContext:
    """Whose certificate it is matters to who tells a secret: a PING is none, and no password goes with it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _down(name: str, why: str) -> PartStatus:
    return PartStatus(name=name, state="down", detail={"error": why})


def make_router(probe: StackProbe) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/v1/sage/status")
    async def status() -> StackStatus:
        return await probe.status()

    return router
