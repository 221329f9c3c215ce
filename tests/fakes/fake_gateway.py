"""A gateway that trains nothing: jobs advance one step each time they are looked at, answers are canned.

Speaks the routes that the command line uses, with the real wire types. By hand:
    python -m tests.fakes.fake_gateway --port 8080
Names ask for outcomes: a job called `fails`, `no-hub` or `dies` fails, `endless` never ends; a question of
`break` breaks off, `error` errs inside the stream, `endless` never ends. The model `base:short` takes three
messages, and none with `long` in it. GET /requests lists what came in;
POST /reset forgets everything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from tests.fakes.fake_gateway_jobs import add_jobs, add_sweeps
from tests.fakes.fake_gateway_state import MODEL, State, cards

from sage_contracts.devices import DeviceLease, DeviceState
from sage_contracts.errors import InvalidRequestError, ModelNotFoundError
from sage_contracts.inference import EngineState, EngineStatus, HostStatus
from sage_contracts.models import MergeJob, MergeRequest, MergeStatus, ModelCard
from sage_contracts.paging import ListPage
from sage_contracts.status import PartStatus, StackStatus
from sage_servicekit import errors

EXPORTED = "finetune_output/code/versions/1/exports/ollama"
# What other backends than our own serve, the last by its bare name.
ELSEWHERE = ("mock", "openai/", "vllm/", "ollama/", "qwen3")
PARITY = {"probes": 3, "same": 2, "top1": 0.97, "dtype": "q8_0"}


def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    body = {"object": "chat.completion.chunk", "choices": [choice]}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def answer(model: str, question: str) -> AsyncIterator[str]:
    yield ": starting the engine\n\n"
    yield chunk({"role": "assistant", "content": ""})
    if question == "error":
        detail = {"message": "The engine died: out of memory.", "code": "engine_failed"}
        yield f"data: {json.dumps({'error': detail, 'source': 'inference'})}\n\n"
        return
    yield chunk({"content": f"{model} says: "})
    if question == "break":
        return
    while question == "endless":
        yield chunk({"content": "more "})
        await asyncio.sleep(0.01)
    for word in f"you asked {question!r}".split(" "):
        yield chunk({"content": f"{word} "})
    yield chunk({}, "stop")
    yield "data: [DONE]\n\n"


def build_app(stack_id: str | None = None) -> FastAPI:
    app = FastAPI()
    state = State()
    errors.install(app, "fake")
    add_jobs(app, state)
    _add_models(app, state)
    add_sweeps(app, state)

    @app.middleware("http")
    async def record(request: Request, call_next: Any) -> Response:
        if request.url.path not in ("/requests", "/reset"):
            state.requests.append(
                {
                    "method": request.method,
                    "path": request.url.path,
                    "key": request.headers.get("authorization"),
                }
            )
        response: Response = await call_next(request)
        return response

    @app.get("/healthz")
    def healthz() -> dict[str, str | None]:
        return {"status": "ok", "service": "gateway", "stack": stack_id}

    @app.post("/reset")
    def reset() -> None:
        state.clear()

    @app.get("/requests")
    def requests() -> list[dict[str, Any]]:
        return state.requests

    @app.get("/v1/sage/status")
    def status() -> StackStatus:
        return StackStatus(
            parts=[
                PartStatus(name="gateway", state="up"),
                PartStatus(name="trainer", state="up", detail={"jobs": 1}),
            ]
        )

    @app.get("/v1/sage/engines")
    def engines() -> HostStatus:
        engine = EngineStatus(
            engine_id="e1",
            kind="transformers",
            base_model=MODEL,
            state=EngineState.READY,
            adapters=["code@1"],
        )
        return HostStatus(device="cpu", engine_kind="transformers", keep_alive_s=300, engines=[engine])

    @app.get("/v1/sage/devices")
    def devices() -> ListPage[DeviceState]:
        lease = DeviceLease(
            holder="train:x",
            purpose="training",
            bytes=2**31,
            label="training code",
            expires_at=0,
            is_idle=False,
        )
        return ListPage(
            data=[DeviceState(device="cpu", total_bytes=2**34, leased_bytes=2**31, leases=[lease])]
        )

    @app.post("/v1/sage/release")
    async def release(request: Request) -> dict[str, Any]:
        body = await request.json()
        state.requests.append({"path": "release body", "body": body})
        if body["model"].startswith(ELSEWHERE):
            raise ModelNotFoundError(f"There is no model {body['model']!r}.", param="model")
        return {"released": True}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        state.requests.append({"path": "chat body", "body": body})
        model = body["model"].removeprefix("finetune/")
        names = [card.id for card in cards(state)]
        if model not in names and not model.startswith(("base:", *ELSEWHERE)):
            raise ModelNotFoundError(
                f"There is no model {model!r}. Models: {', '.join(names)}.", param="model"
            )
        question = body["messages"][-1]["content"]
        if model == "base:short" and (len(body["messages"]) > 3 or "long" in question):
            raise InvalidRequestError("This model's context is full.", param="messages")
        citations = (
            [{"id": 1, "source": "presets.md#cpu", "score": 1.0, "text": "…"}] if body.get("index") else []
        )
        headers = {"X-Sage-Citations": json.dumps(citations)}
        stream = answer(model, question)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    return app


def _add_models(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    def models() -> ListPage[ModelCard]:
        return ListPage(data=cards(state))

    @app.post("/v1/sage/models/{name}/merge")
    def merge(name: str, request: MergeRequest) -> MergeJob:
        if name not in [card.id for card in cards(state)]:
            raise ModelNotFoundError(f"There is no model {name!r}.", param="name")
        if request.dtype == "fp16":
            raise InvalidRequestError("The CPU cannot merge in fp16.", param="dtype")
        merge_id = f"merge-{next(state.counter)}"
        state.merges[merge_id] = 0
        state.formats[merge_id] = request.format
        state.requests.append({"path": "merge body", "body": request.model_dump(mode="json")})
        return MergeJob(id=merge_id, model=name, status=MergeStatus.QUEUED, created_at=int(time.time()))

    @app.get("/v1/sage/merges/{merge_id}")
    def merge_job(merge_id: str) -> MergeJob:
        state.merges[merge_id] += 1
        is_done = state.merges[merge_id] >= 2
        written = "finetune_output/code/merged_model" if state.formats[merge_id] == "safetensors" else None
        return MergeJob(
            id=merge_id,
            model="code@1",
            status=MergeStatus.SUCCEEDED if is_done else MergeStatus.RUNNING,
            phase="writing weights",
            created_at=int(time.time()),
            format=state.formats[merge_id],
            merged_path=written if is_done else None,
            result_path=(written or EXPORTED) if is_done else None,
            report={"parity": PARITY, "size_bytes": 269_000_000} if is_done else {},
        )


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    uvicorn.run(build_app(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
