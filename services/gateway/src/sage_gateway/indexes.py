"""GET /v1/sage/indexes: what `index` in a chat request may name."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from sage_contracts.paging import ListPage
from sage_retrieval.store import IndexCard, IndexStore


def make_router(indexes: IndexStore) -> APIRouter:
    router = APIRouter(tags=["retrieval"])

    @router.get("/v1/sage/indexes")
    async def list_indexes() -> ListPage[IndexCard]:
        return ListPage(data=await asyncio.to_thread(indexes.cards))

    return router
