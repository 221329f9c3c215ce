"""/v1/responses: made by the way of a chat, and never stored."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage_contracts.errors import NotFoundError
from sage_gateway.chat import Chat
from sage_servicekit.errors import no_route


def make_router(chat: Chat) -> APIRouter:
    router = APIRouter(tags=["responses"])

    @router.post("/v1/responses", response_model=None)
    async def create(request: Request) -> Response:
        return await chat.respond(request)

    @router.api_route("/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def stored(rest: str, request: Request) -> Response:
        if not rest.startswith("resp_"):
            raise no_route(request)
        raise NotFoundError(
            f"There is no {request.url.path}. Responses are not stored here: keep what POST /v1/responses "
            "answers, and send it back as part of the next `input`."
        )

    return router
