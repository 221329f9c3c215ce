"""sage status: parts, engines, devices and jobs."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from sage_cli import locate, render
from sage_cli.client import Client
from sage_cli.failures import UNREACHABLE, print_json
from sage_cli.jobs.show import show_jobs
from sage_cli.stack.daemon import Daemon, ProcessState
from sage_cli.stack.gateway import find_gateway
from sage_contracts.devices import DeviceState
from sage_contracts.errors import SageError, ServiceUnavailableError
from sage_contracts.home import Home
from sage_contracts.inference import HostStatus
from sage_contracts.status import StackStatus

_JOBS_SHOWN = 5


def status_command(*, as_json: bool) -> None:
    with Client.from_env() as client:
        try:
            status = client.status()
        except ServiceUnavailableError:
            _show_processes_only(as_json=as_json)
            raise
        engines = _or_none(client.engines)
        devices = _or_none(client.devices) or []
        jobs = _or_none(lambda: client.jobs(_JOBS_SHOWN)) or []
    if as_json:
        print_json(
            {
                "gateway_url": client.gateway_url,
                "parts": [part.model_dump(mode="json") for part in status.parts],
                "engines": engines.model_dump(mode="json")["engines"] if engines else [],
                "devices": [device.model_dump(mode="json") for device in devices],
                "jobs": [job.model_dump(mode="json") for job in jobs],
            }
        )
    else:
        console = render.output()
        gateway = find_gateway()
        home = f", home {locate.home_root()}" if gateway and gateway.record else ""
        kind = gateway.kind_text if gateway else "a stack"
        console.print(Text.assemble((kind, "bold"), f" at {client.gateway_url}{home}"), soft_wrap=True)
        _show_parts(console, status)
        _show_engines(console, engines)
        _show_devices(console, devices)
        if jobs:
            console.print()
            show_jobs(console, jobs)
    # Without its curves a stack still does all its work.
    if any(part.state == "down" and part.name != "tensorboard" for part in status.parts):
        raise typer.Exit(UNREACHABLE)


def _or_none(ask: Any) -> Any:
    # One silent part must not hide the others; it is shown as down.
    try:
        return ask()
    except SageError:
        return None


def _show_parts(console: Console, status: StackStatus) -> None:
    console.print()
    rows = [[part.name, part.state, _detail_text(part.detail)] for part in status.parts]
    render.table(console, ["PART", "STATE", ""], rows, flexible=2)


def _detail_text(detail: dict[str, Any]) -> str:
    plain = {
        key: value for key, value in detail.items() if isinstance(value, str | int | float) and value != ""
    }
    return "  ".join(f"{key} {value}" for key, value in plain.items())


def _show_engines(console: Console, host: HostStatus | None) -> None:
    console.print()
    if host is None or not host.engines:
        console.print("No engine is running; the first question to a model starts one.", style="dim")
        return
    rows = [
        [
            engine.base_model,
            engine.kind,
            f"{engine.state.value} {engine.phase}".strip(),
            ", ".join(engine.adapters),
        ]
        for engine in host.engines
    ]
    render.table(console, ["ENGINE", "KIND", "STATE", "ADAPTERS"], rows, flexible=0)
    for engine in host.engines:
        if engine.error:
            render.line(console, "bad", engine.error)


def _show_devices(console: Console, devices: list[DeviceState]) -> None:
    if not devices:
        return
    console.print()
    rows = [
        [
            device.device,
            f"{render.bytes_text(device.leased_bytes)} of {render.bytes_text(device.total_bytes)}",
            ", ".join(lease.label or lease.holder for lease in device.leases) or "free",
        ]
        for device in devices
    ]
    render.table(console, ["DEVICE", "LEASED", "BY"], rows, flexible=2)


def _show_processes_only(*, as_json: bool) -> None:
    """What supervisord knows, when the gateway does not answer."""
    daemon = Daemon(Home(locate.home_root()))
    states: list[ProcessState] = daemon.states() if daemon.is_answering() else []
    if as_json:
        parts = [{"name": row.name, "state": "down" if row.state != "RUNNING" else "up"} for row in states]
        print_json({"gateway_url": locate.gateway_url(), "parts": parts})
    elif states:
        rows = [
            [row.name, row.state.lower(), row.note or f"log: {daemon.log_of(row.name)}"] for row in states
        ]
        render.table(render.output(), ["PART", "STATE", ""], rows, flexible=2)
