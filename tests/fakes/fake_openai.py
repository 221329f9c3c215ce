"""A small server of OpenAI's dialect with the failures that servers have; the model's name picks one.

By hand: python -m tests.fakes.fake_openai --port 9001
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

BEHAVIOURS = (
    *("silent", "patient", "breaks", "breaks-an-event", "stops"),
    *("bad-request", "rate-limited", "old-vllm-error", "html-error"),
)


def completion_of(body: dict[str, Any]) -> Response:
    """Each prompt, said on; in one piece or in two."""
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]

    def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    if not body.get("stream"):
        whole = [choice(index, f"{prompt} and on", "stop") for index, prompt in enumerate(prompts)]
        return JSONResponse({**head, "choices": whole})
    pieces = [
        piece
        for index, prompt in enumerate(prompts)
        for piece in (choice(index, prompt, None), choice(index, " and on", "stop"))
    ]
    events = [_event({**head, "choices": [piece]}) for piece in pieces]
    return StreamingResponse(iter([*events, b"data: [DONE]\n\n"]), media_type="text/event-stream")


class FakeOpenAI:
    """The program's state: what it serves, and what it saw."""

    def __init__(self, models: tuple[str, ...] = ("fake-model",), api_key: str | None = None) -> None:
        self.models = list(models)
        self.api_key = api_key
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.arrived = threading.Event()
        self.client_left = threading.Event()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.list_models)
        self.app.get("/healthz")(self.health)
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.post("/v1/completions", response_model=None)(self.complete)
        self.app.post("/v1/embeddings", response_model=None)(self.embed)

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def list_models(self) -> dict[str, Any]:
        cards = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in self.models]
        return {"object": "list", "data": cards}

    async def chat(self, request: Request) -> Response:
        body = await self._read(request)
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return _error(401, "Incorrect API key provided.", "invalid_api_key")
        model = body["model"]
        if model not in self.models and model not in BEHAVIOURS:
            return _error(404, f"The model `{model}` does not exist.", "model_not_found")
        refusal = _refusal(model)
        if refusal is not None:
            return refusal
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        if model == "silent":
            await self._wait_for_departure(request)
        if model == "breaks":
            return StreamingResponse(_broken_json(), media_type="application/json")
        words, reason = _answer(body)
        message = {"role": "assistant", "content": "".join(words)}
        if body.get("tools"):
            message, reason = {"role": "assistant", "content": None, "tool_calls": _calls(body)}, "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return JSONResponse({**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(words)})

    async def complete(self, request: Request) -> Response:
        return completion_of(await self._read(request))

    async def embed(self, request: Request) -> Response:
        body = await self._read(request)
        data = [{"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def _read(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.arrived.set()
        return body

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Ends with `client_left` set when the connection goes before the answer is complete."""
        is_complete = False
        try:
            yield _chunk(body, {"role": "assistant", "content": ""})
            if body["model"] == "patient":
                for number in range(8):
                    yield f": starting {number}\n\n".encode()
                    await asyncio.sleep(0.05)
            words, reason = _answer(body)
            if body.get("tools"):
                words, reason = [], "tool_calls"
                for delta in _call_deltas(body):
                    yield _chunk(body, {"tool_calls": [delta]})
            for number, word in enumerate(words):
                yield _chunk(body, {"content": word})
                if body["model"] == "silent" and number == 0:
                    await asyncio.sleep(60)
                if body["model"].startswith("breaks") and number == 1:
                    is_complete = True
                    if body["model"] == "breaks-an-event":
                        yield _chunk(body, {"content": word})[:30]
                    raise ConnectionAbortedError("on purpose")
                if body["model"] == "stops" and number == 1:
                    is_complete = True
                    return
            yield _chunk(body, {}, reason)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield _event({**_head(body, "chat.completion.chunk"), "choices": [], "usage": _usage(words)})
            yield b"data: [DONE]\n\n"
            is_complete = True
        finally:
            if not is_complete:
                self.client_left.set()

    async def _wait_for_departure(self, request: Request) -> None:
        async with asyncio.timeout(60):
            while (await request.receive())["type"] != "http.disconnect":
                pass
        self.client_left.set()


def _refusal(model: str) -> Response | None:
    if model == "bad-request":
        return _error(400, "temperature must be at most 2", "invalid_value", param="temperature")
    if model == "rate-limited":
        return _error(
            429, "Slow down.", "rate_limit_exceeded", headers={"retry-after": "7", "x-should-retry": "true"}
        )
    if model == "old-vllm-error":
        old = {"object": "error", "message": "too many tokens", "type": "BadRequestError", "code": 400}
        return JSONResponse(old, 400)
    if model == "html-error":
        return HTMLResponse("<h1>Bad gateway</h1>", 502)
    return None


def _answer(body: dict[str, Any]) -> tuple[list[str], str]:
    said = str(body["messages"][-1]["content"])
    words = [word if number == 0 else f" {word}" for number, word in enumerate(f"You said: {said}".split())]
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(words)
    return words[:limit], "length" if limit < len(words) else "stop"


def _calls(body: dict[str, Any]) -> list[dict[str, Any]]:
    """One call of the first tool for each of two cities, as an answer in one piece has them."""
    name = body["tools"][0]["function"]["name"]
    arguments = [json.dumps({"city": city}) for city in ("Wuhan", "Oslo")]
    return [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": text}}
        for number, text in enumerate(arguments)
    ]


def _call_deltas(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same calls in pieces."""
    deltas: list[dict[str, Any]] = []
    for number, call in enumerate(_calls(body)):
        arguments = call["function"]["arguments"]
        deltas.append({**call, "index": number, "function": {**call["function"], "arguments": ""}})
        for piece in (arguments[:7], arguments[7:]):
            deltas.append({"index": number, "function": {"arguments": piece}})
    return deltas


async def _broken_json() -> AsyncIterator[bytes]:
    yield b'{"id": "chatcmpl-1", "choices": ['
    raise ConnectionAbortedError("on purpose")


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-fake", "object": kind, "created": 1, "model": body["model"]}


def _usage(words: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _chunk(body: dict[str, Any], delta: dict[str, Any], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return _event({**_head(body, "chat.completion.chunk"), "choices": [choice]})


def _error(
    status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    detail = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": detail}, status, headers)


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--model", action="append")
    arguments = parser.parse_args()
    fake = FakeOpenAI(tuple(arguments.model or ("fake-model",)))
    uvicorn.run(fake.app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
