"""HTTP with the environment's proxies where they are meant: for what is not on this machine."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from typing import Any

import httpx

from sage_contracts.errors import InvalidRequestError

# What httpx raises while it reads the environment's proxies.
PROXY_FAULTS = (ImportError, ValueError, httpx.InvalidURL)
_VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def connect(urls: Sequence[str], **settings: Any) -> httpx.Client:
    """A client of these addresses: loopback ones are called directly; SSL_CERT_FILE holds for all.

    Raises: InvalidRequestError, when one of the addresses needs a proxy and the environment's cannot be used.
    """
    hosts = {httpx.URL(url).host for url in urls}
    local = {host for host in hosts if _is_loopback(host)}
    if local == hosts:
        # Given a transport, httpx looks for no proxies, of which there are some that it cannot even build.
        return httpx.Client(transport=httpx.HTTPTransport(), **settings)
    direct = {f"all://[{host}]" if ":" in host else f"all://{host}": httpx.HTTPTransport() for host in local}
    try:
        return httpx.Client(mounts=direct, **settings)
    except PROXY_FAULTS as error:
        raise InvalidRequestError(proxy_problem(error)) from error


def proxy_problem(error: Exception) -> str:
    """What httpx found wrong with the environment's proxies, and what to do."""
    names = ", ".join(sorted(name for name in os.environ if name.upper() in _VARIABLES)) or "of this system"
    if isinstance(error, ImportError):
        return (
            f"The proxy settings ({names}) ask for SOCKS, which needs a package: `pip install socksio`."
            " Or name an http:// proxy there."
        )
    return f"The proxy settings ({names}) cannot be used: {error}. Write a proxy as http://HOST:PORT."


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
