"""Which names and addresses are this machine's. Standard library only: TensorBoard's image has no more."""

from __future__ import annotations

import ipaddress
import re
import socket

_PRIVATE = ("localhost", "local", "internal")
"""Top domains that no public site can have, as of `host.docker.internal`."""
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d*)?")
"""A Host header in lower case: an IPv6 address, else a name or an IPv4 address."""


def is_of_this_machine(host: str) -> bool:
    """Whether a Host header has an address, or a name that leads here by itself, with or without a port."""
    found = HOST.fullmatch(host.lower())
    if found is None:
        return False
    name = found[1] or found[2].rstrip(".")
    if name.rpartition(".")[2] in _PRIVATE or name == socket.gethostname().lower():
        return True
    # Nobody can register a name without a dot: it is of this machine's network, as those of containers are.
    if found[2] and name and "." not in name:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether what listens on it is for this machine alone."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address.lower() == "localhost"
