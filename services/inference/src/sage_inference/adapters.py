"""How adapters go into a running engine and out of it: vLLM's two routes."""

from __future__ import annotations

import httpx

from sage_contracts.errors import EngineFailedError, ModelNotFoundError
from sage_inference.models import Adapter

_TIMEOUT_S = 60.0


async def load(client: httpx.AsyncClient, adapter: Adapter) -> None:
    """Put an adapter into an engine. Raises: ModelNotFoundError, EngineFailedError."""
    message = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
    response = await _post(client, "/v1/load_lora_adapter", message)
    if response.is_success:
        return
    reason = _reason(response)
    if response.status_code == httpx.codes.NOT_FOUND:
        raise ModelNotFoundError(f"The engine finds no adapter at {adapter.path}: {reason}", param="model")
    raise EngineFailedError(f"The engine cannot load {adapter.name} from {adapter.path}: {reason}")


async def unload(client: httpx.AsyncClient, name: str) -> None:
    """Take an adapter out; one that is not there is fine. Raises: EngineFailedError."""
    response = await _post(client, "/v1/unload_lora_adapter", {"lora_name": name})
    if not response.is_success and response.status_code != httpx.codes.NOT_FOUND:
        raise EngineFailedError(f"The engine cannot unload {name}: {_reason(response)}")


async def _post(client: httpx.AsyncClient, path: str, message: dict[str, str]) -> httpx.Response:
    try:
        return await client.post(path, json=message, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise EngineFailedError(f"The engine does not answer {path}: {error!r}") from error


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:300]
