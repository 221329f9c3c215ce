"""HTTP in front of the model: vLLM's routes and status codes, as far as the host uses them."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Response
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from sage_contracts.errors import InvalidRequestError, ModelNotFoundError, NotFoundError, SageError
from sage_inference.reply import EVENT_STREAM, ReplyWriter
from sage_inference.transformers_engine.generation import Generator, Prompt
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

Result = TypeVar("Result")
Encode = Callable[[Generator], list[Prompt]]
Said = tuple[int, str | Outcome]
"""A piece of the answer to the prompt of that index, or how that answer ended."""

_SOURCE = "transformers"


@dataclass(frozen=True)
class Names:
    """The base's names; the first is the one that answers carry."""

    base: list[str]
    location: str


class Engine:
    """One thread owns the model; everything asked of it waits in one line, first come, first served."""

    def __init__(self, generator: Generator, thread: ThreadPoolExecutor, names: Names) -> None:
        self.names = names
        self._generator = generator
        self._thread = thread

    async def run(self, work: Callable[[Generator], Result]) -> Result:
        """Do something with the model when it is its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._generator)

    def cards(self) -> list[dict[str, Any]]:
        base = [
            {"id": name, "object": "model", "owned_by": _SOURCE, "root": self.names.location, "parent": None}
            for name in self.names.base
        ]
        parent = self.names.base[0]
        return base + [
            {"id": name, "object": "model", "owned_by": _SOURCE, "root": name, "parent": parent}
            for name in self._generator.adapters
        ]

    def require_model(self, name: str) -> None:
        """Raises: ModelNotFoundError."""
        if name not in self.names.base and name not in self._generator.adapters:
            raise ModelNotFoundError(f"The model `{name}` does not exist.", param="model")

    async def answer(self, request: GenerationRequest, encode: Encode) -> AsyncGenerator[Said, None]:
        """Text as it comes, and each prompt's outcome. Closing it early ends the generation.

        Raises: InvalidRequestError, before the first text.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Said | BaseException | None] = asyncio.Queue()
        cancelled = threading.Event()

        def put(item: Said | BaseException | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, item)

        def work(generator: Generator) -> None:
            # Those who left while they waited in line cost nothing.
            if cancelled.is_set():
                return
            try:
                _answer_all(generator, encode(generator), request, put, cancelled)
                put(None)
            except Exception as error:
                put(error)

        turn = asyncio.ensure_future(self.run(work))
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                yield item
        finally:
            cancelled.set()
            turn.cancel()


def _answer_all(
    generator: Generator,
    prompts: list[Prompt],
    request: GenerationRequest,
    put: Callable[[Said], None],
    cancelled: threading.Event,
) -> None:
    for prompt in prompts:
        generator.require_room(prompt, request)
    for index, prompt in enumerate(prompts):

        def say(text: str, index: int = index) -> None:
            put((index, text))

        if not cancelled.is_set():
            put((index, generator.generate(prompt, request, say, cancelled)))


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
        reply = ReplyWriter(send, _SOURCE)
        answering = self._stream(reply) if self._request.stream else self._whole(reply)
        with suppress(ClientLeftError):
            await unless_client_leaves(receive, answering)

    async def _stream(self, reply: ReplyWriter) -> None:
        opening = self._shape.opening()
        outcomes: list[Outcome] = []
        try:
            async with aclosing(self._engine.answer(self._request, self._encode)) as answer:
                async for index, item in answer:
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
                async for _, item in answer:
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
    errors.install(app, _SOURCE)

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
    generator = Generator(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
    )
    if not generator.is_quantised:
        # peft would import it with the first adapter, for nothing: 50 MB, and one to three seconds.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type] # Python's "not to be had"
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
