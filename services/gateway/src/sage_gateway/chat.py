"""Chat completions, responses, plain completions and embeddings: read, route, retrieve, and relay."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sage_chat.backend import Backend, BackendName, ChatCall, Reply
from sage_chat.grounding import CITATIONS_HEADER, citations_header, fitting, grounded, questions_of
from sage_chat.responses import response_reply
from sage_chat.responses_dialect import called_here, chat_body
from sage_chat.routing import Route
from sage_contracts.chat import ChatRequest, Passage
from sage_contracts.errors import InvalidRequestError, SageError
from sage_contracts.responses import ResponseRequest
from sage_contracts.workers import INTERNAL_TOKEN_HEADER
from sage_gateway.directory import ModelDirectory
from sage_gateway.measures import ChatMeasures
from sage_gateway.relay import CLIENT_LEFT_STATUS, RelayResponse
from sage_retrieval.store import IndexStore
from sage_retrieval.tokens import says_something
from sage_servicekit.bodies import whole_body
from sage_servicekit.connection import ClientLeftError, unless_client_leaves
from sage_servicekit.errors import status_of
from sage_servicekit.validation import of_the_request

OVERHEAD_HEADER = "X-Sage-Overhead-Ms"
BACKEND_HEADER = "X-Sage-Backend"

Ask = Callable[[ChatCall], Coroutine[Any, Any, Reply]]
"""One of a backend's ways to answer."""


@dataclass(slots=True)
class Chat:
    """What the endpoints stand on."""

    backends: Mapping[BackendName, Backend]
    directory: ModelDirectory
    indexes: IndexStore
    measures: ChatMeasures
    passages: int
    passages_max_bytes: int

    async def complete(self, request: Request) -> Response:
        started = time.perf_counter()
        body = await _read_json(request)
        return await self._chat(request, started, body, _as_it_is)

    async def respond(self, request: Request) -> Response:
        """OpenAI's Responses API, by the way of a chat."""
        started = time.perf_counter()
        body = await _read_json(request)
        with of_the_request():
            asked = ResponseRequest.model_validate(body)
        translate = partial(response_reply, asked=asked)
        try:
            return await self._chat(request, started, chat_body(asked), translate)
        except SageError as error:
            error.param, error.message = called_here(error.param, error.message, asked)
            raise

    async def _chat(
        self,
        request: Request,
        started: float,
        body: dict[str, Any],
        translate: Callable[[Reply], Coroutine[Any, Any, Reply]],
    ) -> Response:
        body.setdefault("model", "")
        with of_the_request():
            asked = ChatRequest.model_validate(body)
        if not asked.messages:
            raise InvalidRequestError("messages: at least one message is needed", param="messages")
        route = await self.directory.route(asked.model)
        passages: list[Passage] = []
        if asked.index:
            passages = await asyncio.to_thread(self._retrieve, asked.index, body["messages"])
            body["messages"] = grounded(body["messages"], passages)
        headers = {CITATIONS_HEADER: citations_header(passages)} if asked.index else {}
        call = ChatCall(route.model, body, tuple(passages), _own_headers(request))

        async def ask(call: ChatCall) -> Reply:
            return await translate(await self.backends[route.backend].stream(call))

        return await self._relay(request, started, route, ask, call, headers)

    def _retrieve(self, index: str, messages: list[dict[str, Any]]) -> list[Passage]:
        # "And why is that?" is about what was asked before.
        question = next(filter(says_something, questions_of(messages)), "")
        return fitting(self.indexes.search(index, question, self.passages), self.passages_max_bytes)

    async def pass_on(self, request: Request, about: str, way: Callable[[Backend], Ask]) -> Response:
        """What is no conversation: a bare prompt, or texts to embed, in the body's field `about`."""
        started = time.perf_counter()
        body = await _read_json(request)
        if not isinstance(body.get("model"), str):
            raise InvalidRequestError("model: a name is needed, as GET /v1/models lists it", param="model")
        if body.get(about) is None:
            raise InvalidRequestError(f"{about}: the request needs it", param=about)
        if body.get("index") is not None:
            raise InvalidRequestError(
                "index: passages are put in front of a chat's question; a bare prompt is left alone, and "
                "so are texts to embed. Use /v1/chat/completions.",
                param="index",
            )
        route = await self.directory.route(body["model"])
        call = ChatCall(route.model, body, headers=_own_headers(request))
        return await self._relay(request, started, route, way(self.backends[route.backend]), call, {})

    async def _relay(
        self,
        request: Request,
        started: float,
        route: Route,
        ask: Ask,
        call: ChatCall,
        headers: dict[str, str],
    ) -> Response:
        overhead_s = time.perf_counter() - started
        self.measures.overhead_s.observe(overhead_s)
        status = 500  # of what nobody expected
        try:
            # Non-streamed answers and cold engines take long before their first byte: watch the client now.
            reply = await unless_client_leaves(request.receive, ask(call))
            status = reply.status
        except ClientLeftError:
            status = CLIENT_LEFT_STATUS
            return Response(status_code=status)
        except SageError as error:
            status = status_of(error)
            raise
        finally:
            self.measures.answers.labels(route.backend, str(status)).inc()
        marks = {BACKEND_HEADER: str(route.backend), OVERHEAD_HEADER: f"{overhead_s * 1000:.2f}"}
        return RelayResponse(reply, {**headers, **marks})


async def _as_it_is(reply: Reply) -> Reply:
    return reply


def _own_headers(request: Request) -> dict[str, str]:
    return {
        key: value
        for key, value in request.headers.items()
        if key == "x-request-id" or (key.startswith("x-sage-") and key != INTERNAL_TOKEN_HEADER.lower())
    }


async def _read_json(request: Request) -> dict[str, Any]:
    """The body as an object. Raises: InvalidRequestError."""
    content = await whole_body(request)
    try:
        body = json.loads(content, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    return body


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not part of JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is too large a number")  # and could only be sent on as Infinity
    return value


def make_router(chat: Chat) -> APIRouter:
    router = APIRouter(tags=["chat"])

    # Not as parameters of FastAPI's: the body is relayed as it is, not as a model would write it again.
    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await chat.complete(request)

    @router.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await chat.pass_on(request, "prompt", lambda backend: backend.complete)

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(request: Request) -> Response:
        return await chat.pass_on(request, "input", lambda backend: backend.embed)

    return router
