"""Routes: OpenAI's surface in front of the engines, and what the host says about them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from sage_contracts.errors import InvalidRequestError
from sage_contracts.inference import HostStatus
from sage_inference.finder import Finder
from sage_inference.fit import Kind
from sage_inference.host import Host
from sage_inference.orchestrator import Orchestrator
from sage_inference.relay import Answer, Call
from sage_inference.settings import InferenceSettings

SESSION_HEADER = "X-Sage-Session"
"""Tells the chats of several people apart, so that one's end does not stop the other's engine."""


class ReleaseSessionRequest(BaseModel):
    """POST /v1/sage/release: a chat with this model is over."""

    model_config = ConfigDict(extra="forbid")

    model: str
    keep_alive_s: float = 0
    """Above 0 nothing is stopped now: the host's own idle timer does it."""
    session: str = ""


class ReleaseSessionReply(BaseModel):
    stopped: bool
    """False: somebody else uses the engine, or it is kept."""


def make_router(
    host: Host, orchestrator: Orchestrator, finder: Finder, settings: InferenceSettings, kind: Kind
) -> APIRouter:
    """`kind` is that of the host's engines."""
    router = APIRouter()

    async def answer(request: Request, path: str) -> Response:
        call = Call.parse(await request.body())
        # Our own engine says for itself what it lacks.
        if call.wants_tools and kind == "vllm" and not settings.tool_call_parser:
            raise InvalidRequestError(
                "tools: this host is not told how its models write calls of tools. Set SAGE_TOOL_CALL_PARSER "
                "in its environment to the name of a parser of vLLM (hermes for Qwen2.5), or leave the tools "
                'out, or send tool_choice "none".',
                param="tools",
            )
        session = request.headers.get(SESSION_HEADER, "")
        return Answer(host, finder, settings, path, call, await finder.find(call.model), session)

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, "/v1/chat/completions")

    @router.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, "/v1/completions")

    @router.get("/v1/models")
    async def models() -> Response:
        return Response(await orchestrator.models_page(), media_type="application/json")

    @router.get("/v1/sage/engines")
    async def engines() -> HostStatus:
        return host.status()

    @router.post("/v1/sage/release")
    async def release(request: ReleaseSessionRequest) -> ReleaseSessionReply:
        wanted = await finder.find(request.model.removeprefix("finetune/"))
        may_stop = request.keep_alive_s <= 0
        return ReleaseSessionReply(stopped=await host.end_session(wanted, request.session, may_stop=may_stop))

    return router
