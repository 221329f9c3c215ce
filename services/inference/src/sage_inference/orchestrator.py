"""The inference host's line to the orchestrator: names, device leases, signs of life."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from pydantic import BaseModel

from sage_contracts.devices import LeaseReply, LeaseRequest, ReleaseRequest
from sage_contracts.errors import ServiceUnavailableError, from_response
from sage_contracts.models import MergeJob, MergeRequest, ResolvedModel
from sage_contracts.workers import WorkerBeat
from sage_inference.settings import InferenceSettings

Reply = TypeVar("Reply", bound=BaseModel)

_TIMEOUT_S = 10.0
_RESOLVE_CACHE_S = 2.0
_CACHE_ENTRIES = 512


class Orchestrator:
    """Async and typed. Raises: SageError as the orchestrator raised it, ServiceUnavailableError if silent."""

    def __init__(self, settings: InferenceSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._resolved: dict[str, tuple[float, ResolvedModel]] = {}
        # Parts of one stack never talk through the proxy that the environment names for the world outside.
        self._client = httpx.AsyncClient(
            base_url=settings.orchestrator_url,
            headers=settings.internal_headers,
            timeout=_TIMEOUT_S,
            trust_env=False,
        )

    async def resolve(self, name: str, *, is_fresh: bool = False) -> ResolvedModel:
        """What a name means now, at most two seconds old: aliases move. Raises: ModelNotFoundError."""
        known = None if is_fresh else self._resolved.get(name)
        if known is not None and self._clock() - known[0] < _RESOLVE_CACHE_S:
            return known[1]
        response = await self._send("GET", "/internal/models/resolve", params={"name": name})
        model = ResolvedModel.model_validate_json(response.content)
        if len(self._resolved) >= _CACHE_ENTRIES:
            self._resolved.clear()
        self._resolved[name] = (self._clock(), model)
        return model

    async def merge(self, version: str) -> MergeJob:
        """Have a version merged; one that is under way already is the answer.

        Raises: ModelNotFoundError; ConflictError while it is merged with another dtype.
        """
        response = await self._send("POST", f"/v1/sage/models/{version}/merge", message=MergeRequest())
        return MergeJob.model_validate_json(response.content)

    async def merge_job(self, merge_id: str) -> MergeJob:
        return MergeJob.model_validate_json((await self._send("GET", f"/v1/sage/merges/{merge_id}")).content)

    async def models_page(self) -> bytes:
        """The list of tuned models, as the orchestrator sends it."""
        return (await self._send("GET", "/v1/models")).content

    async def lease(self, request: LeaseRequest) -> LeaseReply:
        """Raises: DeviceBusyError, which says who has the device."""
        response = await self._send("POST", "/internal/devices/lease", message=request)
        return LeaseReply.model_validate_json(response.content)

    async def release(self, holder: str) -> None:
        await self._send("POST", "/internal/devices/release", message=ReleaseRequest(holder=holder))

    async def beat(self, message: WorkerBeat) -> None:
        await self._send("POST", "/internal/workers/beat", message=message)

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(
        self,
        method: str,
        path: str,
        *,
        message: BaseModel | None = None,
        params: dict[str, str] | None = None,
    ) -> httpx.Response:
        content = message.model_dump_json() if message is not None else None
        headers = {"content-type": "application/json"} if message is not None else {}
        try:
            response = await self._client.request(
                method, path, content=content, headers=headers, params=params
            )
        except httpx.HTTPError as error:
            raise ServiceUnavailableError(
                f"The orchestrator at {self._client.base_url} does not answer {path}: {error!r}. "
                "Is it running? SAGE_ORCHESTRATOR_URL says where it is looked for.",
                retry_after_s=5,
            ) from error
        if response.is_error:
            raise from_response(
                response.status_code, response.content, retry_after=response.headers.get("retry-after")
            )
        return response
