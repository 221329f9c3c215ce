"""sage doctor: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import typer
from rich.text import Text

from sage.tools.finetune.native.build import lacks_compiler
from sage_cli import locate, render
from sage_cli.failures import YOUR_INPUT
from sage_cli.stack import compose, ports
from sage_cli.stack.gateway import find_gateway
from sage_cli.stack.parts import missing_parts
from sage_cli.stack.updown import require_home
from sage_contracts.errors import SageError
from sage_contracts.home import Home

_GB = 1024**3
_ROOMY_DISK_BYTES = 6 * _GB
_ROOMY_MEMORY_BYTES = 3 * _GB
_PROBE_TIMEOUT_S = 5.0
_ENGINES = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what was seen, and what to do unless it is fine."""

    state: Literal["ok", "warn", "bad"]
    name: str
    seen: str
    advice: str = ""


def doctor_command() -> None:
    console = render.output()
    checks: list[Callable[[], Finding]] = [
        check_python, check_parts, check_disk, check_memory, check_gpu,
        check_docker, check_ports, check_broker, check_hub, check_stack,
    ]  # fmt: skip
    findings = []
    for check in checks:
        finding = check()
        findings.append(finding)
        text = Text.assemble((finding.name.ljust(9), "bold"), finding.seen)
        render.line(console, finding.state, text)
        if finding.advice:
            console.print(Text(f"    {finding.advice}", style="dim"), soft_wrap=not console.is_terminal)
    bad = sum(finding.state == "bad" for finding in findings)
    console.print()
    if bad:
        console.print(f"{bad} problem{'s' if bad > 1 else ''} to solve first.", style="red")
        raise typer.Exit(YOUR_INPUT)
    console.print(
        "This machine can run SAGE Finetune. Start: sage finetune quickstart code",
        style="green",
        soft_wrap=True,
    )


def check_python() -> Finding:
    # An older Python would not have come this far: the package refuses to install there.
    return Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")


def check_parts() -> Finding:
    missing = missing_parts()
    if missing:
        return Finding(
            "warn", "parts", f"not installed here: {', '.join(missing)}",
            "Fine for driving a stack elsewhere or in Docker. For local processes: `make install`.",
        )  # fmt: skip
    has = [name for name in ("torch", "vllm", "tensorboard") if importlib.util.find_spec(name)]
    if "torch" not in has:
        return Finding(
            "bad", "parts", "services without torch: nothing can be trained", "Run `make install`."
        )
    return _check_engine(has_vllm="vllm" in has or bool(os.environ.get("SAGE_VLLM_COMMAND")))


def _check_engine(*, has_vllm: bool) -> Finding:
    asked = os.environ.get("SAGE_ENGINE") or "auto"
    if asked not in _ENGINES:
        return Finding(
            "bad", "parts", f"SAGE_ENGINE={asked!r} is no engine", f"Set it to one of {', '.join(_ENGINES)}."
        )
    if asked == "vllm" and not has_vllm:
        return Finding(
            "bad", "parts", "SAGE_ENGINE=vllm, which is not installed",
            "`make install VLLM=1` adds vLLM; unset SAGE_ENGINE to do without.",
        )  # fmt: skip
    if asked == "transformers" and has_vllm:
        engine = "transformers (by SAGE_ENGINE; vLLM is installed)"
    else:
        engine = "vLLM" if has_vllm else "transformers (slower; `make install VLLM=1` adds vLLM)"
    return Finding("ok", "parts", f"all services; engine: {engine}")


def check_disk() -> Finding:
    home = Home(locate.home_root())
    existing = next(folder for folder in [home.root, *home.root.parents] if folder.exists())
    if home.root.exists():
        try:
            require_home(home)
        except SageError as error:
            return Finding("bad", "disk", error.message)
    free = shutil.disk_usage(existing).free
    seen = f"{render.bytes_text(free)} free for {home.root}"
    if free < _ROOMY_DISK_BYTES:
        return Finding(
            "warn", "disk", seen,
            "A base model takes 0.3 to 15 GB. Free some space, or set SAGE_HOME to a larger disk.",
        )  # fmt: skip
    return Finding("ok", "disk", seen)


def check_memory() -> Finding:
    available = _available_memory()
    if available is None:
        return Finding("warn", "memory", "cannot be seen on this system")
    seen = f"{render.bytes_text(available)} available, {os.cpu_count()} CPUs"
    if available < _ROOMY_MEMORY_BYTES:
        return Finding(
            "warn", "memory", seen, "Training the smallest model takes about 2 GB. Close something first."
        )  # fmt: skip
    return Finding("ok", "memory", seen)


def check_gpu() -> Finding:
    if shutil.which("nvidia-smi") is None:
        advice = "Enough for small models (smollm2-135m). With a GPU installed, install its driver."
        if missing := lacks_compiler():
            advice += f" Its steps would be shorter, but {missing}."
        return Finding("warn", "gpu", "no NVIDIA GPU seen: training runs on the CPU", advice)
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(
            "warn", "gpu", "nvidia-smi does not answer", "Check the driver: run `nvidia-smi` by hand."
        )
    if answer.returncode != 0:
        return Finding("warn", "gpu", "nvidia-smi fails", "Check the driver: run `nvidia-smi` by hand.")
    cards = [
        " ".join(line.split(",")[:1]) + f" ({line.split(',')[1].strip()})"
        for line in answer.stdout.splitlines()
    ]
    return Finding("ok", "gpu", ", ".join(cards))


def check_docker() -> Finding:
    problem = compose.docker_problem()
    if problem:
        return Finding(
            "warn", "docker", problem, "Only needed for containers; `sage up --embedded` does without."
        )
    try:
        files = compose.find_files()
    except SageError as error:
        return Finding("bad", "docker", error.message)
    where = str(files[0]) if files else "no compose.yaml of SAGE found here"
    return Finding("ok", "docker", f"engine and Compose answer; {where}")


def check_ports() -> Finding:
    if (gateway := find_gateway()) and gateway.is_usable:
        return Finding("ok", "ports", f"the stack answers at {gateway.url}")
    wanted = locate.wanted_ports()
    hosts = {part: ports.host_of(part, locate.bind_host()) for part in wanted}
    taken = {part: port for part, port in wanted.items() if not ports.is_free(hosts[part], port)}
    if taken:
        seen = "; ".join(
            f"{port} ({part}) is in use by {ports.owner_of(port)}" for part, port in taken.items()
        )
        changes = " ".join(f"{locate.PORT_VARIABLES[part]}={port + 10}" for part, port in taken.items())
        return Finding("bad", "ports", seen, f"Stop that, or choose other ports: {changes} sage up")
    return Finding("ok", "ports", f"free: {', '.join(str(port) for port in wanted.values())}")


def check_broker() -> Finding:
    url = os.environ.get("SAGE_BROKER_URL", "filesystem://")
    if url.startswith("filesystem:"):
        return Finding(
            "ok", "broker", f"folders under {Home(locate.home_root()).state / 'broker'} (no Redis needed)"
        )
    parts = urlsplit(url)
    where = f"{parts.hostname}:{parts.port or 6379}"
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=_PROBE_TIMEOUT_S):
            return Finding("ok", "broker", f"something listens at {where}")
    except OSError as error:
        return Finding(
            "bad", "broker", f"{where} does not answer: {error}",
            "Start Redis there, or unset SAGE_BROKER_URL to do without.",
        )  # fmt: skip


def check_hub() -> Finding:
    import httpx

    from sage_cli.connection import PROXY_FAULTS, proxy_problem

    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "yes"):
        return Finding(
            "warn", "hub", "switched off by HF_HUB_OFFLINE", "Models come from folders or smollm2-135m."
        )
    try:
        from huggingface_hub.constants import ENDPOINT as url  # noqa: N811 - as HF_ENDPOINT, or the default
    except ImportError:
        return Finding(
            "warn",
            "hub",
            "not looked at: huggingface_hub is not installed here",
            "Install it: `make install`.",
        )
    try:
        httpx.head(url, timeout=_PROBE_TIMEOUT_S, follow_redirects=False)
    except PROXY_FAULTS as error:
        return Finding("warn", "hub", f"{urlsplit(url).netloc} is not asked", proxy_problem(error))
    except httpx.HTTPError as error:
        return Finding(
            "warn", "hub", f"{urlsplit(url).netloc} is not reached ({type(error).__name__})",
            "Use --model FOLDER, or the built-in smollm2-135m, which comes from PyPI.",
        )  # fmt: skip
    return Finding("ok", "hub", f"{urlsplit(url).netloc} answers")


def check_stack() -> Finding:
    if (gateway := find_gateway()) and gateway.is_usable:
        return Finding("ok", "stack", f"{gateway.kind_text} at {gateway.url}")
    if locate.read_record():
        return Finding(
            "warn", "stack", "was started but its gateway does not answer", "`sage status`, then `sage up`."
        )
    return Finding("ok", "stack", "not running; quickstart starts it, or `sage up`")


def _available_memory() -> int | None:
    try:
        for row in Path("/proc/meminfo").read_text().splitlines():
            if row.startswith("MemAvailable:"):
                return int(row.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
