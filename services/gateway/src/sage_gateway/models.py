"""GET /v1/models: what all backends offer, in one list."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage_chat.backend import BackendName
from sage_chat.routing import explicit_route, not_found
from sage_contracts.models import ModelCard
from sage_contracts.paging import ListPage
from sage_gateway.directory import ModelDirectory
from sage_gateway.proxy import Proxy


def make_router(directory: ModelDirectory, orchestrator: Proxy) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", response_model_exclude_none=True)
    async def list_models() -> ListPage[ModelCard]:
        return ListPage(data=await directory.listing())

    @router.get("/v1/models/{name:path}", response_model=None)
    async def retrieve(name: str, request: Request) -> Response | ModelCard:
        route = explicit_route(name)
        if route is None or route.backend is BackendName.FINETUNE:
            return await orchestrator.forward(request, f"/v1/models/{route.model if route else name}")
        listed = await directory.listing()
        for card in listed:
            if card.id == name:
                return card
        raise not_found(name, [card.id for card in listed if card.id != BackendName.MOCK], None)

    @router.delete("/v1/models/{name:path}", response_model=None)
    async def delete(name: str, request: Request) -> Response:
        route = explicit_route(name)
        bare = route.model if route and route.backend is BackendName.FINETUNE else name
        try:
            return await orchestrator.forward(request, f"/v1/models/{bare}")
        finally:
            # Also after a failure: it may have been deleted before its answer was lost.
            await directory.forget_tuned()

    return router
