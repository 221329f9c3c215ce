"""The processes of the embedded stack, as data."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sage_cli.locate import reachable
from sage_cli.stack.ports import host_of
from sage_contracts.errors import InvalidRequestError

_STOP_GRACE_S = 30.0  # the trainer's own default


@dataclass(frozen=True)
class Part:
    """One process: how it is started, and how its health is seen."""

    name: str
    command: tuple[str, ...]
    port: int | None = None
    health_path: str | None = None
    """GET this on `port`; any 2xx is healthy."""
    alive_file: str | None = None
    """In the run folder; healthy while it is touched."""
    stop_wait_s: int = 15
    """Between the request to stop and the kill."""
    is_awaited: bool = True
    """`sage up` waits for it."""
    host: str = "127.0.0.1"
    """Where its port is called."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of what all parts are given."""


def stop_grace_from_env() -> float:
    """SAGE_STOP_GRACE_S: what a training process gets for its checkpoint. Raises: InvalidRequestError."""
    text = os.environ.get("SAGE_STOP_GRACE_S") or str(_STOP_GRACE_S)
    try:
        grace_s = float(text)
    except ValueError:
        grace_s = math.nan
    if not (math.isfinite(grace_s) and grace_s >= 0):
        raise InvalidRequestError(
            f"SAGE_STOP_GRACE_S={text!r} is no time to stop in: give a number of seconds, such as 120."
        )
    return grace_s


def embedded_parts(
    ports: Mapping[str, int], gateway_host: str, output_dir: Path, *, stop_grace_s: float = _STOP_GRACE_S
) -> list[Part]:
    """Everything of the stack that is installed here, in the order of starting."""

    def module(name: str) -> tuple[str, ...]:
        return (sys.executable, "-m", name)

    def worker(name: str, *, stop_wait_s: int) -> Part:
        return Part(name, module(f"sage_{name}"), alive_file=f"{name}.alive", stop_wait_s=stop_wait_s)

    parts = [
        Part("orchestrator", module("sage_orchestrator"), ports["orchestrator"], "/healthz"),
        # A running job writes a checkpoint before the trainer leaves, and it then tells how the job stands.
        worker("trainer", stop_wait_s=max(60, math.ceil(stop_grace_s) + 15)),
        worker("merger", stop_wait_s=30),
        Part("inference", module("sage_inference"), ports["inference"], "/healthz", stop_wait_s=30),
        Part(
            "gateway",
            module("sage_gateway"),
            ports["gateway"],
            "/healthz",
            host=reachable(gateway_host),
            environment={"SAGE_HOST": gateway_host},
        ),
    ]
    if importlib.util.find_spec("tensorboard"):
        port = ports["tensorboard"]
        where = ("--host", host_of("tensorboard", gateway_host), "--port", str(port))
        command = (*module("sage_servicekit.tensorboard"), "--logdir", str(output_dir), *where)
        parts.append(Part("tensorboard", command, port, "/", is_awaited=False))
    return parts


def missing_parts() -> list[str]:
    """Services that are not installed beside this CLI."""
    names = ("orchestrator", "trainer", "merger", "inference", "gateway")
    return [name for name in names if importlib.util.find_spec(f"sage_{name}") is None]
