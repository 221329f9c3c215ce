"""Is a port free, and if not, whose is it? Linux tells through /proc; elsewhere the owner stays unknown."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from sage_cli.locate import PORT_VARIABLES
from sage_contracts.errors import InvalidRequestError

_LISTENING = "0A"
_THIS_MACHINE = "127.0.0.1"


def host_of(part: str, gateway_host: str) -> str:
    """Where a part listens: the gateway alone asks for keys, so that the others never leave this machine."""
    return gateway_host if part == "gateway" else _THIS_MACHINE


def is_free(host: str, port: int) -> bool:
    """True where a server could listen now. Raises: InvalidRequestError for an address that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the servers do: a port whose last connections still linger counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise InvalidRequestError(
                f"Port {port} needs root: choose one above 1023.", param="port"
            ) from None
        except socket.gaierror:
            raise InvalidRequestError(f"SAGE_HOST={host!r} is no address of this machine.") from None
        except OSError:
            return False
    return True


def require_free(gateway_host: str, ports: Mapping[str, int]) -> None:
    """Raises: InvalidRequestError that names each taken port, its owner and the variable to change."""
    by_port: dict[int, str] = {}
    for part, port in ports.items():
        if port in by_port:
            raise InvalidRequestError(
                f"{part} and {by_port[port]} are both to listen on port {port}."
                f" Change {PORT_VARIABLES[part]} or {PORT_VARIABLES[by_port[port]]}."
            )
        by_port[port] = part
    taken = [
        f"Port {port} for {part} is in use by {owner_of(port) or 'another process'}:"
        f" stop that, or choose another port with {PORT_VARIABLES[part]}, for example"
        f" {PORT_VARIABLES[part]}={port + 10}."
        for part, port in ports.items()
        if not is_free(host_of(part, gateway_host), port)
    ]
    if taken:
        raise InvalidRequestError("\n".join([*taken, "Nothing was started."]))


def owner_of(port: int) -> str | None:
    """`python3 -m http.server (pid 123)`, or None where that cannot be seen."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for process in _processes():
        if inodes & _socket_inodes(process):
            return f"{_command(process)} (pid {process.name})"
    return "a process of another user"


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def _processes() -> list[Path]:
    try:
        return [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    except OSError:
        return []


def _socket_inodes(process: Path) -> set[str]:
    found = set()
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                found.add(str(descriptor.readlink()))
            except OSError:
                continue
    except OSError:
        return set()
    return found


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "a process"
    text = " ".join(word for word in words if word)
    return text if len(text) <= 60 else text[:57] + "…"
