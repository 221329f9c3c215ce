"""How adapters go into a running engine and out of it: vLLM's two routes."""

from __future__ import annotations

import re

import httpx

from sage_contracts.errors import EngineFailedError, ModelNotFoundError
from sage_inference.models import Adapter

_IS_LOADED = re.compile("has already been ?loaded")  # some versions of vLLM left the space out


async def load(client: httpx.AsyncClient, adapter: Adapter, *, timeout_s: float) -> None:
    """Put an adapter into an engine, which may answer somebody first.

    Raises: ModelNotFoundError, EngineFailedError.
    """
    message = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
    response = await _post(client, "/v1/load_lora_adapter", message, timeout_s)
    if response.is_success:
        return
    reason = _reason(response)
    if response.status_code == httpx.codes.BAD_REQUEST and _IS_LOADED.search(reason):
        # By an earlier call that was given up before it was its turn: a version's name means one adapter.
        return
    if response.status_code == httpx.codes.NOT_FOUND:
        raise ModelNotFoundError(f"The engine finds no adapter at {adapter.path}: {reason}", param="model")
    raise EngineFailedError(f"The engine cannot load {adapter.name} from {adapter.path}: {reason}")


async def unload(client: httpx.AsyncClient, name: str, *, timeout_s: float) -> None:
    """Take an adapter out; one that is not there is fine. Raises: EngineFailedError."""
    response = await _post(client, "/v1/unload_lora_adapter", {"lora_name": name}, timeout_s)
    if not response.is_success and response.status_code != httpx.codes.NOT_FOUND:
        raise EngineFailedError(f"The engine cannot unload {name}: {_reason(response)}")


async def _post(
    client: httpx.AsyncClient, path: str, message: dict[str, str], timeout_s: float
) -> httpx.Response:
    try:
        return await client.post(path, json=message, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise EngineFailedError(f"The engine does not answer {path}: {error!r}") from error


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:300]
