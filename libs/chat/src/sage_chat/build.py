"""All five backends, from addresses."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx

from sage_chat.backend import Backend, BackendName
from sage_chat.dialect import DialectBackend, Endpoint, Relay
from sage_chat.finetune import FinetuneBackend
from sage_chat.mock import MockBackend
from sage_chat.ollama import OllamaBackend
from sage_chat.upstream import Deadlines

_NO_OPENAI = (
    "The openai backend has no key: set OPENAI_API_KEY where the gateway runs, "
    "or SAGE_OPENAI_BASE_URL to a server that needs none."
)
_NO_VLLM = (
    "The vllm backend has no address: set SAGE_VLLM_BASE_URL (http://host:port/v1) where the gateway runs."
)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the servers are. None: not configured."""

    inference_url: str
    orchestrator_url: str
    openai: Endpoint | None = None
    vllm: Endpoint | None = None
    ollama_url: str = "http://127.0.0.1:11434"
    deadlines: Deadlines = field(default_factory=Deadlines)


def build_backends(client: httpx.AsyncClient, addresses: Addresses) -> dict[BackendName, Backend]:
    """One of each. They share the client, which the caller closes."""

    def relay(source: str, endpoint: Endpoint) -> Relay:
        return Relay(
            client, source, Endpoint(v1_url(endpoint.base_url), endpoint.api_key), addresses.deadlines
        )

    return {
        BackendName.MOCK: MockBackend(),
        BackendName.FINETUNE: FinetuneBackend(
            host=relay("inference", Endpoint(addresses.inference_url)),
            registry=relay("orchestrator", Endpoint(addresses.orchestrator_url)),
        ),
        BackendName.OPENAI: DialectBackend(
            BackendName.OPENAI, relay("openai", addresses.openai) if addresses.openai else None, _NO_OPENAI
        ),
        BackendName.VLLM: DialectBackend(
            BackendName.VLLM, relay("vllm", addresses.vllm) if addresses.vllm else None, _NO_VLLM
        ),
        BackendName.OLLAMA: OllamaBackend(client, addresses.ollama_url.rstrip("/"), addresses.deadlines),
    }


def v1_url(url: str) -> str:
    """A server's address as the base of its OpenAI routes: `/v1` is added where no path is given."""
    trimmed = url.rstrip("/")
    return trimmed if httpx.URL(trimmed).path.strip("/") else f"{trimmed}/v1"
