"""/v1/models for people, /internal/models/resolve for the inference host."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from sage_contracts.models import ModelCard, ResolvedModel
from sage_contracts.paging import Deleted, ListPage
from sage_orchestrator.models.service import ModelService
from sage_orchestrator.paging import list_page
from sage_servicekit.app import require_internal


def make_router(service: ModelService) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    def list_models() -> ListPage[ModelCard]:
        return list_page(service.list_models(), has_more=False)

    # A base model may be a Hub id or a folder, with slashes in it.
    @router.get("/v1/models/{model:path}")
    def retrieve(model: str) -> ModelCard:
        return service.get(model)

    @router.delete("/v1/models/{model:path}")
    def delete(model: str) -> Deleted:
        return service.delete(model)

    @router.get("/internal/models/resolve", dependencies=[Depends(require_internal)])
    def resolve(name: str) -> ResolvedModel:
        return service.resolve(name)

    return router
