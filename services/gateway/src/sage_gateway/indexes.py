"""/v1/sage/indexes: what `index` in a chat request may name, and the ones that people add."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from sage_contracts.indexes import IndexCard, PutIndexRequest
from sage_contracts.paging import Deleted, ListPage
from sage_retrieval.store import IndexStore
from sage_servicekit.bodies import whole_body
from sage_servicekit.validation import of_the_request


def make_router(indexes: IndexStore) -> APIRouter:
    router = APIRouter(tags=["retrieval"])
    # Each that waited for its turn in a thread would keep that thread from the searches.
    one_at_a_time = asyncio.Lock()

    @router.get("/v1/sage/indexes")
    async def list_indexes() -> ListPage[IndexCard]:
        return ListPage(data=await asyncio.to_thread(indexes.cards))

    # Its documents come with the request: what is a folder to the sender need not be one here.
    @router.put("/v1/sage/indexes/{name}")
    async def put_index(name: str, request: Request) -> IndexCard:
        body = await whole_body(request)

        def put() -> IndexCard:
            # Not as a parameter of FastAPI's: to parse many megabytes would hold up every other request.
            with of_the_request():
                documents = PutIndexRequest.model_validate_json(body).documents
            return indexes.put(name, documents)

        async with one_at_a_time:
            return await asyncio.to_thread(put)

    @router.delete("/v1/sage/indexes/{name}")
    async def delete_index(name: str) -> Deleted:
        await asyncio.to_thread(indexes.remove, name)
        return Deleted(id=name, object="sage.index")

    return router
