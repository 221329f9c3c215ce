"""A local Ollama server, through its own API: its OpenAI routes lack options and keep_alive."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from sage_chat.backend import BackendName, ChatCall, Reply, whole_reply
from sage_chat.completions import STREAM_HEADERS, Completion, error_event, to_json
from sage_chat.dialect import Endpoint, Relay
from sage_chat.ollama_dialect import StreamTranslator, chat_request, completion_from, embed_request
from sage_chat.upstream import Deadlines, read_error, read_whole, relay_bytes, send
from sage_contracts.errors import SageError, UpstreamError
from sage_contracts.models import ModelCard


@dataclass(slots=True)
class OllamaBackend:
    client: httpx.AsyncClient
    base_url: str
    """Without a path: `http://127.0.0.1:11434`."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    name: BackendName = BackendName.OLLAMA

    async def stream(self, call: ChatCall) -> Reply:
        response = await self._open("POST", "/api/chat", chat_request(call))
        if not response.is_success:
            return await self._error(response)
        if call.is_stream:
            return Reply(200, self._events(response, call), dict(STREAM_HEADERS), response.aclose)
        answer = await self._json(response)
        return whole_reply(200, completion_from(answer, call.model))

    async def complete(self, call: ChatCall) -> Reply:
        # Its own API has `raw` for this, which takes no `suffix`; its OpenAI route has both.
        relay = Relay(self.client, self.name, Endpoint(f"{self.base_url}/v1"), self.deadlines)
        return await relay.post("/completions", call.for_upstream())

    async def embed(self, call: ChatCall) -> Reply:
        response = await self._open("POST", "/api/embed", embed_request(call))
        if not response.is_success:
            return await self._error(response)
        answer = await self._json(response)
        is_base64 = call.body.get("encoding_format") == "base64"
        return whole_reply(200, to_json(_embeddings(answer, call.model, is_base64)))

    async def models(self) -> list[ModelCard]:
        response = await self._open("GET", "/api/tags", None, limit_s=self.deadlines.models_s)
        if not response.is_success:
            body = await read_error(response, self.name)
            raise UpstreamError(body.error.message, source=self.name)
        answer = await self._json(response)
        return [
            ModelCard(id=str(item["name"]), created=_epoch_s(item.get("modified_at")), owned_by="ollama")
            for item in answer.get("models") or []
            if isinstance(item, dict) and "name" in item
        ]

    async def _open(
        self, method: str, path: str, body: Any, *, limit_s: float | None = None
    ) -> httpx.Response:
        request = self.client.build_request(
            method,
            self.base_url + path,
            content=None if body is None else to_json(body),
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            timeout=limit_s or self.deadlines.for_request(),
        )
        return await send(self.client, request, self.name)

    async def _json(self, response: httpx.Response) -> dict[str, Any]:
        content = await read_whole(response, self.name, self.deadlines.first_byte_s)
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise UpstreamError(
                "ollama answered with something that is no JSON.", source=self.name
            ) from error
        if not isinstance(answer, dict) or answer.get("error"):
            raise UpstreamError(
                f"ollama: {answer['error'] if isinstance(answer, dict) else answer}", source=self.name
            )
        return answer

    async def _error(self, response: httpx.Response) -> Reply:
        body = await read_error(response, self.name)
        status = response.status_code if response.is_error else 502
        return whole_reply(status, to_json(body.model_dump()))

    async def _events(self, response: httpx.Response, call: ChatCall) -> AsyncGenerator[bytes, None]:
        translator = StreamTranslator(Completion(call.model), call.wants_usage)
        try:
            async with aclosing(relay_bytes(response, self.name, self.deadlines.between_bytes_s)) as chunks:
                async for chunk in chunks:
                    for event in translator.feed(chunk):
                        yield event
            for event in translator.close():
                yield event
        except SageError as error:
            if not translator.is_done:
                yield error_event(error.to_body(self.name))


def _embeddings(answer: dict[str, Any], model: str, is_base64: bool) -> dict[str, Any]:
    vectors = answer.get("embeddings") or []
    prompt_tokens = int(answer.get("prompt_eval_count") or 0)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": _base64(vector) if is_base64 else vector}
            for number, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _base64(vector: list[float]) -> str:
    # The official SDK asks for little-endian 32-bit floats unless told otherwise.
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _epoch_s(modified_at: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(modified_at)).timestamp())
    except ValueError:
        return 0
