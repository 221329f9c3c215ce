"""The one line in which all that is asked of the model waits its turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sage_contracts.errors import ModelNotFoundError
from sage_inference.transformers_engine.generation import Generator, Prompt
from sage_inference.transformers_engine.protocol import GenerationRequest, Outcome

Result = TypeVar("Result")
Encode = Callable[[Generator], list[Prompt]]
Said = tuple[int, str | Outcome]
"""A piece of the answer to the prompt of that index, or how that answer ended."""

SOURCE = "transformers"
# Well below what clients and proxies take for a dead line.
_COMMENT_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Names:
    """The base's names; the first is the one that answers carry."""

    base: list[str]
    location: str


@dataclass(frozen=True)
class Waiting:
    """Nothing of the answer has come yet; `ahead` others are before it."""

    ahead: int

    def __str__(self) -> str:
        if not self.ahead:
            return "reading the prompt"
        return f"waiting for {self.ahead} answer{'s' if self.ahead > 1 else ''} before this one"


class Engine:
    """One thread owns the model; everything asked of it waits in one line, first come, first served."""

    def __init__(
        self,
        generator: Generator,
        thread: ThreadPoolExecutor,
        names: Names,
        *,
        comment_interval_s: float = _COMMENT_INTERVAL_S,
    ) -> None:
        self.names = names
        self._generator = generator
        self._thread = thread
        self._comment_interval_s = comment_interval_s
        self._line: list[asyncio.Future[None]] = []

    async def run(self, work: Callable[[Generator], Result]) -> Result:
        """Do something with the model when it is its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._generator)

    def cards(self) -> list[dict[str, Any]]:
        base = [
            {"id": name, "object": "model", "owned_by": SOURCE, "root": self.names.location, "parent": None}
            for name in self.names.base
        ]
        parent = self.names.base[0]
        return base + [
            {"id": name, "object": "model", "owned_by": SOURCE, "root": name, "parent": parent}
            for name in self._generator.adapters
        ]

    def require_model(self, name: str) -> None:
        """Raises: ModelNotFoundError."""
        if name not in self.names.base and name not in self._generator.adapters:
            raise ModelNotFoundError(f"The model `{name}` does not exist.", param="model")

    async def answer(
        self, request: GenerationRequest, encode: Encode
    ) -> AsyncGenerator[Said | Waiting, None]:
        """Text as it comes, and each prompt's outcome; before the first, every few seconds, why not yet.

        Closing it early ends the generation.

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
        self._line.append(turn)
        turn.add_done_callback(self._line.remove)
        pause_s: float | None = self._comment_interval_s
        try:
            while True:
                try:
                    async with asyncio.timeout(pause_s):
                        item = await pieces.get()
                except TimeoutError:
                    if pieces.empty():  # else it came in the same moment
                        yield Waiting(self._line.index(turn))
                    continue
                pause_s = None
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
