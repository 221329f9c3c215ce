"""A small server of Ollama's API. Source: docs.ollama.com/api: chat, tags, embed, errors, streaming.

By hand: python -m tests.fakes.fake_ollama --port 11435
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from tests.fakes.fake_openai import completion_of

_CREATED = "2026-08-04T19:22:45.499127Z"
BEHAVIOURS = ("silent:latest", "breaks:latest", "fails:latest", "thinker:latest")


class FakeOllama:
    """The program's state: what it serves, and what it saw."""

    def __init__(self, models: tuple[str, ...] = ("fake-llm:latest",)) -> None:
        self.models = list(models)
        self.requests: list[dict[str, Any]] = []
        self.client_left = threading.Event()
        self.app = FastAPI()
        self.app.get("/", response_class=PlainTextResponse)(self.root)
        self.app.get("/api/tags")(self.tags)
        self.app.get("/api/version")(self.version)
        self.app.post("/api/chat", response_model=None)(self.chat)
        self.app.post("/v1/completions", response_model=None)(self.complete)
        self.app.post("/api/embed", response_model=None)(self.embed)

    async def root(self) -> str:
        return "Ollama is running"

    async def version(self) -> dict[str, str]:
        return {"version": "0.40.12"}

    async def tags(self) -> dict[str, Any]:
        return {"models": [_tag(name) for name in self.models]}

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if not body.get("model"):
            return JSONResponse({"error": "model is required"}, 400)
        body["model"] = _tagged(body["model"])
        if body["model"] not in self.models and body["model"] not in BEHAVIOURS:
            return JSONResponse({"error": f"model '{body['model']}' not found"}, 404)
        if body["model"] == "fails:latest":
            return JSONResponse({"error": "llama runner process has terminated: exit status 2"}, 500)
        if not body.get("messages"):
            loaded = {"message": {"role": "assistant", "content": ""}, "done_reason": "load", "done": True}
            return JSONResponse({"model": body["model"], "created_at": _CREATED, **loaded})
        if body.get("stream", True):
            return StreamingResponse(self._lines(body), media_type="application/x-ndjson")
        message = _message(body, "".join(_answer(body)[0]))
        return JSONResponse(_line(body, message) | _final(body))

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        return completion_of(body)

    async def embed(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        vectors = [[0.5, -1.0, float(number)] for number in range(len(inputs))]
        return JSONResponse({"model": body["model"], "embeddings": vectors, "prompt_eval_count": len(inputs)})

    async def _lines(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Ends with `client_left` set when the connection goes before the answer is complete."""
        is_complete = False
        try:
            if body["model"] == "thinker:latest":
                thought = {"role": "assistant", "content": "", "thinking": "Hmm."}
                yield _encode(_line(body, thought))
            for number, word in enumerate(_answer(body)[0]):
                yield _encode(_line(body, _message(body, word)))
                if body["model"] == "silent:latest" and number == 0:
                    await asyncio.sleep(60)
                if body["model"] == "breaks:latest" and number == 1:
                    is_complete = True
                    yield _encode({"error": "an error was encountered while running the model"})
                    return
                if body.get("tools"):
                    break
            yield _encode(_line(body, {"role": "assistant", "content": ""}) | _final(body))
            is_complete = True
        finally:
            if not is_complete:
                self.client_left.set()


def _answer(body: dict[str, Any]) -> tuple[list[str], str]:
    said = str(body["messages"][-1]["content"])
    words = [word if number == 0 else f" {word}" for number, word in enumerate(f"You said: {said}".split())]
    limit = (body.get("options") or {}).get("num_predict") or len(words)
    return words[:limit], "length" if limit < len(words) else "stop"


def _message(body: dict[str, Any], content: str) -> dict[str, Any]:
    if body.get("tools"):
        function = {"name": body["tools"][0]["function"]["name"], "arguments": {"city": "Wuhan"}}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    return {"role": "assistant", "content": content}


def _line(body: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    return {"model": body["model"], "created_at": _CREATED, "message": message, "done": False}


def _final(body: dict[str, Any]) -> dict[str, Any]:
    words, reason = _answer(body)
    durations = {"total_duration": 4883583458, "load_duration": 1334875, "prompt_eval_duration": 342546000}
    counts = {"prompt_eval_count": 3, "eval_count": len(words), "eval_duration": 4535599000}
    return {"done": True, "done_reason": reason, **durations, **counts}


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def _tag(name: str) -> dict[str, Any]:
    details = {"parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"]}
    sizes = {"parameter_size": "134.5M", "quantization_level": "Q4_1"}
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-08-04T19:22:45.499127378+08:00",
        "size": 98765432,
        "digest": "a2af6cc3eb7fa8be8504abaf9b04e88f17a119ec3f04a3addf55f92841195f5a",
        "details": {**details, **sizes},
    }


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=11435)
    arguments = parser.parse_args()
    uvicorn.run(FakeOllama().app, host="127.0.0.1", port=arguments.port)


if __name__ == "__main__":
    main()
