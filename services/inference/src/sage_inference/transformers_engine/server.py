"""HTTP in front of the model: vLLM's routes and status codes, as far as the host uses them."""

from __future__ import annotations

import argparse
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from sage_contracts.errors import InvalidRequestError, NotFoundError, SageError
from sage_inference.reply import EVENT_STREAM, ReplyWriter
from sage_inference.transformers_engine.engine import SOURCE, Encode, Engine, Names, Waiting
from sage_inference.transformers_engine.generation import Generator, is_quantised
from sage_inference.transformers_engine.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    LoadAdapterRequest,
    Outcome,
    Shape,
    UnloadAdapterRequest,
)
from sage_servicekit import errors
from sage_servicekit.connection import ClientLeftError, unless_client_leaves


class Completion(Response):
    """One answer, streamed or whole; a client that leaves ends the generation."""

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        encode: Encode,
        *,
        is_chat: bool,
    ) -> None:
        self.background = None
        self.status_code = 200
        self.raw_headers = []
        self._engine = engine
        self._request = request
        self._encode = encode
        self._shape = Shape(request.model, is_chat)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = ReplyWriter(send, SOURCE)
        answering = self._stream(reply) if self._request.stream else self._whole(reply)
        with suppress(ClientLeftError):
            await unless_client_leaves(receive, answering)

    async def _stream(self, reply: ReplyWriter) -> None:
        opening = self._shape.opening()
        outcomes: list[Outcome] = []
        try:
            async with aclosing(self._engine.answer(self._request, self._encode)) as answer:
                async for said in answer:
                    if isinstance(said, Waiting):
                        await reply.comment(str(said))
                        continue
                    index, item = said
                    await reply.start(200, EVENT_STREAM)
                    if isinstance(item, Outcome):
                        outcomes.append(item)
                        await reply.write(opening + self._shape.ending(item, index))
                    else:
                        await reply.write(opening + self._shape.piece(item, index))
                    opening = b""
            await reply.write(self._shape.closing(outcomes, with_usage=self._request.wants_usage))
            await reply.end()
        except Exception as error:
            await reply.fail(_known(error))

    async def _whole(self, reply: ReplyWriter) -> None:
        texts: list[str] = []
        outcomes: list[Outcome] = []
        text = ""
        try:
            async with aclosing(self._engine.answer(self._request, self._encode)) as answer:
                async for said in answer:
                    if isinstance(said, Waiting):
                        continue
                    _, item = said
                    if isinstance(item, Outcome):
                        texts.append(text)
                        outcomes.append(item)
                        text = ""
                    else:
                        text += item
            content = JSONResponse(self._shape.whole(texts, outcomes)).body
            await reply.whole(200, "application/json", bytes(content))
        except Exception as error:
            await reply.fail(_known(error))


def _known(error: Exception) -> SageError:
    if isinstance(error, SageError):
        return error
    logging.getLogger(__name__).error("generation failed", exc_info=error)
    return SageError(f"{type(error).__name__} while generating: {error}")


def build_app(engine: Engine) -> FastAPI:
    app = FastAPI(title="transformers engine")
    errors.install(app, SOURCE)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": engine.cards()}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatCompletionRequest) -> Response:
        request.require_supported()
        engine.require_model(request.model)
        return Completion(engine, request, lambda generator: generator.encode_chat(request), is_chat=True)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest) -> Response:
        request.require_supported()
        engine.require_model(request.model)
        return Completion(engine, request, lambda generator: generator.encode_text(request), is_chat=False)

    @app.post("/v1/load_lora_adapter")
    async def load(request: LoadAdapterRequest) -> Response:
        return await _load(engine, request)

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: UnloadAdapterRequest) -> Response:
        name = request.lora_name
        try:
            await engine.run(lambda generator: generator.unload_adapter(name))
        except KeyError:
            raise NotFoundError(f"The lora adapter '{name}' cannot be found.") from None
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    return app


async def _load(engine: Engine, request: LoadAdapterRequest) -> Response:
    name, path = request.lora_name, Path(request.lora_path)

    def load(generator: Generator) -> None:
        if name in engine.names.base:
            raise InvalidRequestError(f"The lora adapter '{name}' conflicts with a served base model.")
        if name in generator.adapters and not request.load_inplace:
            raise InvalidRequestError(
                f"The lora adapter '{name}' has already been loaded; 'load_inplace' replaces it."
            )
        if not (path / "adapter_config.json").is_file():
            raise NotFoundError(f"Loading lora {name} failed: no adapter found at {path}")
        generator.load_adapter(name, path)

    await engine.run(load)
    return Response(f"Success: LoRA adapter '{name}' added successfully.")


def serve(arguments: argparse.Namespace) -> None:
    """Load the model, then listen: who can connect can also be answered."""
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not is_quantised(arguments.model):
        # It would be imported with the weights, for nothing: 50 MB, and one to three seconds.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type] # Python's "not to be had"
    generator = Generator(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
    )
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    engine = Engine(generator, thread, Names(arguments.served_model_name, arguments.model))
    uvicorn.run(
        build_app(engine),
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=75,
    )
