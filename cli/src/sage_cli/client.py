"""The one HTTP client: OpenAI's API with our few additions. Raises sage_contracts.errors."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from sage_cli import locate
from sage_cli.connection import connect
from sage_cli.sse import ChatItem, lines_of, read_chat
from sage_cli.stack.gateway import find_own_gateway, said_by
from sage_contracts.devices import DeviceState
from sage_contracts.errors import ServiceUnavailableError, UpstreamError, from_response
from sage_contracts.files import FileObject
from sage_contracts.indexes import IndexCard, PutIndexRequest
from sage_contracts.inference import HostStatus
from sage_contracts.jobs import CreateJobRequest, EventType, FineTuningJob, JobCheckpoint, JobEvent
from sage_contracts.models import MergeJob, MergeRequest, ModelCard
from sage_contracts.paging import ListPage
from sage_contracts.status import StackStatus
from sage_contracts.sweeps import CreateSweepRequest, Sweep

Answer = TypeVar("Answer", bound=BaseModel)
Item = TypeVar("Item", bound=BaseModel)

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 60.0
# Of as many documents as a request may have, on a slow machine.
INDEX_TIMEOUT_S = 600.0
# A cold engine sends comments while it starts, so silence this long means that nobody is there.
STREAM_SILENCE_S = 180.0


# The most that OpenAI's API gives at once; a longer list comes in several.
PAGE = 100

# Tells conversations apart, so that the end of one does not stop the engine of another.
_SESSION_HEADER = "X-Sage-Session"


@dataclass(frozen=True)
class Answering:
    """An answer under way, and the passages it was given."""

    items: Iterator[ChatItem]
    citations: list[dict[str, Any]]
    """Each with id and source."""


class Client:
    """Typed calls. Jobs and models go to the orchestrator where one is named, all else to the gateway."""

    def __init__(
        self, gateway_url: str, orchestrator_url: str | None = None, api_key: str | None = None
    ) -> None:
        self._session = secrets.token_hex(8)
        headers = {_SESSION_HEADER: self._session}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        timeout = httpx.Timeout(REPLY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self.gateway_url = gateway_url
        self._jobs_url = orchestrator_url or gateway_url
        self._http = connect([self.gateway_url, self._jobs_url], headers=headers, timeout=timeout)

    @classmethod
    def from_env(cls) -> Self:
        """A client of the stack that the environment, or the last `sage up`, points at.

        Raises: ConflictError: what answers there is another home's.
        """
        if not locate.explicit_gateway_url():
            find_own_gateway()
        return cls(locate.gateway_url(), locate.orchestrator_url(), locate.api_key())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def upload(self, path: Path, filename: str) -> FileObject:
        """POST /v1/files, read from disk as it is sent."""
        with path.open("rb") as stream:
            return self._ask(
                FileObject,
                "POST",
                f"{self._jobs_url}/v1/files",
                data={"purpose": "fine-tune"},
                files={"file": (filename, stream)},
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, read=600, write=120),
            )

    def file(self, file_id: str) -> FileObject:
        return self._ask(FileObject, "GET", f"{self._jobs_url}/v1/files/{file_id}")

    def delete_file(self, file_id: str) -> None:
        self._send("DELETE", f"{self._jobs_url}/v1/files/{file_id}")

    def create_job(self, request: CreateJobRequest) -> FineTuningJob:
        body = request.model_dump(mode="json", exclude_none=True)
        return self._ask(FineTuningJob, "POST", f"{self._jobs_url}/v1/fine_tuning/jobs", json=body)

    def job(self, job_id: str) -> FineTuningJob:
        return self._ask(FineTuningJob, "GET", f"{self._jobs_url}/v1/fine_tuning/jobs/{job_id}")

    def jobs(self, limit: int, *, name: str | None = None) -> list[FineTuningJob]:
        """Newest first."""
        url = f"{self._jobs_url}/v1/fine_tuning/jobs"
        return self._list(ListPage[FineTuningJob], url, limit, name)

    def act(self, job_id: str, verb: str) -> FineTuningJob:
        """cancel, pause or resume."""
        return self._ask(FineTuningJob, "POST", f"{self._jobs_url}/v1/fine_tuning/jobs/{job_id}/{verb}")

    def events_page(
        self, job_id: str, *, after: str | None, limit: int = PAGE, kind: EventType | None = None
    ) -> ListPage[JobEvent]:
        """Oldest first (OpenAI's default is the other way round): what came after the event `after`."""
        params: dict[str, Any] = {"limit": limit, "order": "asc"} | ({"after": after} if after else {})
        if kind is not None:
            params["type"] = kind
        url = f"{self._jobs_url}/v1/fine_tuning/jobs/{job_id}/events"
        return self._ask(ListPage[JobEvent], "GET", url, params=params)

    def checkpoints(self, job_id: str) -> list[JobCheckpoint]:
        """Newest first."""
        url = f"{self._jobs_url}/v1/fine_tuning/jobs/{job_id}/checkpoints"
        return self._ask(ListPage[JobCheckpoint], "GET", url, params={"limit": 100}).data

    def create_sweep(self, request: CreateSweepRequest) -> Sweep:
        body = request.model_dump(mode="json", exclude_none=True)
        return self._ask(Sweep, "POST", f"{self._jobs_url}/v1/sage/sweeps", json=body)

    def sweep(self, sweep_id: str) -> Sweep:
        return self._ask(Sweep, "GET", f"{self._jobs_url}/v1/sage/sweeps/{sweep_id}")

    def sweeps(self, limit: int, *, name: str | None = None) -> list[Sweep]:
        """Newest first."""
        return self._list(ListPage[Sweep], f"{self._jobs_url}/v1/sage/sweeps", limit, name)

    def cancel_sweep(self, sweep_id: str) -> Sweep:
        return self._ask(Sweep, "POST", f"{self._jobs_url}/v1/sage/sweeps/{sweep_id}/cancel")

    def models(self) -> list[ModelCard]:
        """What every backend of the gateway offers."""
        return self._ask(ListPage[ModelCard], "GET", f"{self.gateway_url}/v1/models").data

    def put_index(self, name: str, request: PutIndexRequest) -> IndexCard:
        """All documents of an index, in place of those it had."""
        timeout = httpx.Timeout(INDEX_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        return self._ask(
            IndexCard,
            "PUT",
            self._index_url(name),
            content=request.model_dump_json(),
            headers=headers,
            timeout=timeout,
        )

    def indexes(self) -> list[IndexCard]:
        return self._ask(ListPage[IndexCard], "GET", f"{self.gateway_url}/v1/sage/indexes").data

    def delete_index(self, name: str) -> None:
        self._send("DELETE", self._index_url(name))

    def _index_url(self, name: str) -> str:
        return f"{self.gateway_url}/v1/sage/indexes/{quote(name, safe='')}"

    def merge(self, name: str, request: MergeRequest) -> MergeJob:
        url = f"{self._jobs_url}/v1/sage/models/{name}/merge"
        return self._ask(MergeJob, "POST", url, json=request.model_dump())

    def merge_job(self, merge_id: str) -> MergeJob:
        return self._ask(MergeJob, "GET", f"{self._jobs_url}/v1/sage/merges/{merge_id}")

    def status(self) -> StackStatus:
        return self._ask(StackStatus, "GET", f"{self.gateway_url}/v1/sage/status")

    def engines(self) -> HostStatus:
        return self._ask(HostStatus, "GET", f"{self.gateway_url}/v1/sage/engines")

    def devices(self) -> list[DeviceState]:
        return self._ask(ListPage[DeviceState], "GET", f"{self._jobs_url}/v1/sage/devices").data

    def release(self, model: str, keep_alive_s: float) -> None:
        """Tell the stack that this conversation is over; at 0 the engine stops once nobody else uses it."""
        body = {"model": model, "keep_alive_s": keep_alive_s, "session": self._session}
        self._send("POST", f"{self.gateway_url}/v1/sage/release", json=body)

    @contextmanager
    def chat(self, body: dict[str, Any]) -> Iterator[Answering]:
        """POST /v1/chat/completions, streamed; leaving the context ends the request. Raises: SageError."""
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        url = f"{self.gateway_url}/v1/chat/completions"
        try:
            with self._http.stream("POST", url, json=body | {"stream": True}, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise self._error_of(url, response)
                yield Answering(read_chat(lines_of(response.iter_bytes())), _citations(response.headers))
        except httpx.HTTPError as error:
            raise _unreachable(self._base_of(url), error) from error

    def _list(self, page: type[ListPage[Item]], url: str, limit: int, name: str | None) -> list[Item]:
        params: dict[str, Any] = {} if name is None else {"name": name}
        found: list[Item] = []
        while True:
            params["limit"] = min(PAGE, limit - len(found))
            answer = self._ask(page, "GET", url, params=params)
            found += answer.data
            if not answer.has_more or len(found) >= limit:
                return found
            params["after"] = answer.last_id

    def _ask(self, answer: type[Answer], method: str, url: str, **request: Any) -> Answer:
        response = self._send(method, url, **request)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            if stranger := self._stranger(url, response):
                raise stranger from error
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UpstreamError(
                f"{url} answered something that this version of sage cannot read ({where}: {first['msg']})."
                " Is it a SAGE gateway of the same version?"
            ) from error

    def _send(self, method: str, url: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, url, **request)
        except httpx.HTTPError as error:
            raise _unreachable(self._base_of(url), error) from error
        if response.is_error:
            raise self._error_of(url, response)
        return response

    def _base_of(self, url: str) -> str:
        return self._jobs_url if url.startswith(f"{self._jobs_url}/") else self.gateway_url

    def _error_of(self, url: str, response: httpx.Response) -> Exception:
        content, retry_after = response.content, response.headers.get("retry-after")
        error = from_response(response.status_code, content, retry_after=retry_after)
        # Errors of ours say who raised them, and these statuses a proxy in front of us gives by itself.
        is_ours = error.source is not None or response.status_code in (413, 502, 503, 504)
        if is_ours or not (stranger := self._stranger(url, response)):
            return error
        stranger.__cause__ = error  # what came, for SAGE_DEBUG
        return stranger

    def _stranger(self, url: str, response: httpx.Response) -> UpstreamError | None:
        """What to say of an answer where another program than SAGE gives it; None where it is ours."""
        base = self._base_of(url)
        try:
            said = said_by(self._http.get(f"{base}/healthz", timeout=CONNECT_TIMEOUT_S))
        except httpx.HTTPError:
            return None
        if said.get("service") in ("gateway", "orchestrator"):
            return None
        return UpstreamError(
            f"What answers at {base} is no service of SAGE (HTTP {response.status_code} for"
            f" {httpx.URL(url).path}). "
            + (
                _advice_of_variable(base)
                or "Another program has the port: `sage doctor` names it. Choose another with"
                " SAGE_GATEWAY_PORT, or set SAGE_GATEWAY_URL to a stack elsewhere."
            )
        )


def _citations(headers: httpx.Headers) -> list[dict[str, Any]]:
    try:
        found = json.loads(headers.get("x-sage-citations", "[]"))
    except ValueError:
        return []
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _unreachable(base: str, error: httpx.HTTPError) -> ServiceUnavailableError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        advice = _advice_of_variable(base) or "Elsewhere? Set SAGE_GATEWAY_URL."
        return ServiceUnavailableError(f"Nothing answers at {base}. Start the stack: `sage up`. {advice}")
    if isinstance(error, httpx.ProxyError):
        return ServiceUnavailableError(
            f"The environment's proxy does not let us through to {base} ({error})."
            " Needs it none? Add its host to NO_PROXY."
        )
    if isinstance(error, httpx.TimeoutException):
        return ServiceUnavailableError(
            f"{base} does not answer in time. `sage status` and the logs tell more."
        )
    return ServiceUnavailableError(f"The connection to {base} broke off ({error}). Try again.")


def _advice_of_variable(base: str) -> str | None:
    variable = locate.variable_of(base)
    return variable and f"{variable} points there: correct it, or unset it for this machine's stack."
