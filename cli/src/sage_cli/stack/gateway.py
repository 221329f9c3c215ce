"""The gateway that answers where this command would send everything, and whose stack it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from sage_cli import locate
from sage_cli.locate import StackRecord
from sage_contracts.errors import ConflictError

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Gateway:
    """A gateway of SAGE, and what it says of itself."""

    url: str
    stack_id: str | None
    """Which embedded stack it belongs to. Containers, and services started by hand, do not say."""

    @property
    def record(self) -> StackRecord | None:
        """What this home wrote down of that stack; None where it is not known to be this home's."""
        record = locate.read_record()
        if record is None:
            return None
        if record.kind == "embedded":
            return record if record.stack_id == self.stack_id else None
        return record if self.stack_id is None and record.gateway_url == self.url else None

    @property
    def kind_text(self) -> str:
        kind = self.record.kind if self.record else ""
        return {"embedded": "local processes", "compose": "containers"}.get(kind, "a stack")

    @property
    def is_usable(self) -> bool:
        """By its URL any gateway is; else none of a stack that another home started.

        Data, jobs and models would go to that home, on a shared machine to another person's.
        """
        is_of_another_home = self.stack_id is not None and self.record is None
        return locate.explicit_gateway_url() is not None or not is_of_another_home


def find_gateway() -> Gateway | None:
    """The SAGE gateway that answers where the environment or the last `sage up` points."""
    url = locate.gateway_url()
    try:
        said = said_by(httpx.get(f"{url}/healthz", timeout=_TIMEOUT_S, trust_env=False))
    except httpx.HTTPError:
        return None
    return Gateway(url, said.get("stack")) if said.get("service") == "gateway" else None


def said_by(reply: httpx.Response) -> dict[str, Any]:
    """What a service of SAGE says of itself at /healthz; empty where another program answers."""
    try:
        said = reply.json()
    except ValueError:
        return {}
    return said if reply.is_success and isinstance(said, dict) else {}


def find_own_gateway() -> Gateway | None:
    """The same. Raises: ConflictError: it is another home's, and was not asked for by its URL."""
    gateway = find_gateway()
    if gateway and not gateway.is_usable:
        port = gateway.url.rpartition(":")[2]
        raise ConflictError(
            f"Port {port} belongs to a stack of another home than {locate.home_root()}: set"
            f" SAGE_GATEWAY_URL={gateway.url} to use it, or SAGE_GATEWAY_PORT for one of your own."
        )
    return gateway
