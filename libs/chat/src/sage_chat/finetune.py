"""Our own tuned models: the inference host answers and starts engines; the orchestrator knows the names."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from sage_chat.backend import BackendName, ChatCall, Reply
from sage_chat.dialect import Relay
from sage_contracts.errors import InvalidRequestError, UpstreamError
from sage_contracts.models import ModelCard


@dataclass(slots=True)
class FinetuneBackend:
    """Two addresses, one dialect."""

    host: Relay
    """The inference host."""
    registry: Relay
    """The orchestrator."""
    name: BackendName = BackendName.FINETUNE

    async def stream(self, call: ChatCall) -> Reply:
        return await self.host.post("/chat/completions", call.for_upstream(), call.headers)

    async def complete(self, call: ChatCall) -> Reply:
        return await self.host.post("/completions", call.for_upstream(), call.headers)

    async def embed(self, call: ChatCall) -> Reply:
        raise InvalidRequestError(
            "The finetune backend has no embeddings: use openai/, vllm/ or ollama/ with an embedding model.",
            param="model",
            source=self.name,
        )

    async def models(self) -> list[ModelCard]:
        listed = await self.registry.get_models()
        try:
            return [ModelCard.model_validate(item) for item in listed]
        except ValidationError as error:
            raise UpstreamError(
                f"{self.registry.source} lists a model that cannot be read here ({error}). "
                "Run all parts in the same version.",
                source=self.name,
            ) from error
