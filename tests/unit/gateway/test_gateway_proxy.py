"""What of a request reaches the part that answers it."""

from __future__ import annotations

import httpx
from fastapi import FastAPI, Request

from sage_contracts.workers import INTERNAL_TOKEN_HEADER
from sage_gateway.proxy import Proxy, make_router


async def test_what_opens_the_inner_routes_is_not_a_clients_to_send() -> None:
    part, gateway = FastAPI(), FastAPI()
    secrets = {INTERNAL_TOKEN_HEADER: "guess", "authorization": "Bearer key", "cookie": "c=1"}

    @part.get("/v1/files")
    def heard(request: Request) -> list[str]:
        return [name for name in ("x-request-id", *secrets) if name in request.headers]

    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(part)) as to_part,
        httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://gateway") as client,
    ):
        proxy = Proxy(to_part, "orchestrator", "http://part")
        gateway.include_router(make_router(proxy, proxy))
        answer = await client.get("/v1/files", headers={**secrets, "x-request-id": "mine"})
    assert answer.json() == ["x-request-id"]
