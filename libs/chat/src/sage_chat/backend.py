"""What every chat backend is: one OpenAI-shaped request in; status, headers and bytes out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from sage_contracts.chat import Passage
from sage_contracts.models import ModelCard


class BackendName(StrEnum):
    """Also the prefix of a model name: `ollama/qwen3`."""

    MOCK = "mock"
    OPENAI = "openai"
    FINETUNE = "finetune"
    VLLM = "vllm"
    OLLAMA = "ollama"


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One request, routed: the backend's own name for the model, and the body as the client sent it."""

    model: str
    body: Mapping[str, Any]
    passages: tuple[Passage, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    """The client's `x-sage-…` headers (a chat's session): for our own host, and nobody else's."""

    @property
    def is_stream(self) -> bool:
        return self.body.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        options = self.body.get("stream_options")
        return isinstance(options, Mapping) and options.get("include_usage") is True

    def for_upstream(self) -> dict[str, Any]:
        """The body with the model renamed and our own field taken out; nothing else is touched."""
        return {**{key: value for key, value in self.body.items() if key != "index"}, "model": self.model}


@dataclass(slots=True)
class Reply:
    """An answer under way. Close it, also when it was never read, to let go of the upstream."""

    status: int
    body: AsyncGenerator[bytes, None]
    headers: dict[str, str] = field(default_factory=dict)
    on_close: Callable[[], Awaitable[None]] | None = None

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def aclose(self) -> None:
        """Idempotent."""
        await self.body.aclose()
        if self.on_close is not None:
            # A generator that was never started skips its own `finally`.
            await self.on_close()


class Backend(Protocol):
    """Errors before the first byte are raised as SageError, or are a Reply whose body has OpenAI's shape."""

    @property
    def name(self) -> BackendName: ...

    async def stream(self, call: ChatCall) -> Reply:
        """Answer a chat completion, streamed or not as the call says. Raises: SageError."""
        ...

    async def complete(self, call: ChatCall) -> Reply:
        """Go on from a bare prompt, without a chat template, streamed or not as the call says.

        Raises: SageError; InvalidRequestError where the backend cannot.
        """
        ...

    async def embed(self, call: ChatCall) -> Reply:
        """Answer an embeddings request. Raises: InvalidRequestError where the backend has none."""
        ...

    async def models(self) -> list[ModelCard]:
        """What it would answer for, by its own names; [] when it is not configured. Raises: SageError."""
        ...


def whole_reply(status: int, content: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON answer that is already there."""
    framing = {"content-type": "application/json", "content-length": str(len(content))}
    return Reply(status, _once(content), {**(headers or {}), **framing})


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content
