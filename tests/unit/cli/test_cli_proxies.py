"""Proxies of the environment: they are for what is elsewhere, and a wrong one says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

Sage = Callable[..., Any]
VARIABLES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.fixture
def proxy() -> Iterator[str]:
    """A proxy behind which every address is a gateway without models."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"object": "list", "data": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense://x"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
def test_a_stack_on_this_machine_is_called_directly(
    online: Sage, environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    environment.setenv(name, value)
    ran = online("models")
    assert (ran.exit_code, ran.stderr) == (0, "")


def test_a_stack_elsewhere_is_called_through_the_proxy(
    sage: Sage, environment: pytest.MonkeyPatch, proxy: str
) -> None:
    environment.setenv("SAGE_GATEWAY_URL", "http://gateway.test")
    environment.setenv("HTTP_PROXY", proxy)
    ran = sage("models")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.output.startswith("No models yet.")


def test_a_proxy_that_lets_nobody_through_is_named(
    sage: Sage, environment: pytest.MonkeyPatch, proxy: str
) -> None:
    environment.setenv("SAGE_GATEWAY_URL", "https://gateway.test")
    environment.setenv("HTTPS_PROXY", proxy)  # it knows no CONNECT
    ran = sage("models")
    assert ran.exit_code == 4
    assert "proxy does not let us through to https://gateway.test" in ran.stderr
    assert "NO_PROXY" in ran.stderr


def test_only_the_one_elsewhere_goes_through_the_proxy(
    online: Sage, environment: pytest.MonkeyPatch, proxy: str
) -> None:
    online("finetune", "start", "--task", "code", "--no-watch")
    environment.setenv("SAGE_ORCHESTRATOR_URL", "http://orchestrator.test")
    environment.setenv("HTTP_PROXY", proxy)
    assert online("finetune", "list").output.startswith("No jobs yet.")
    assert "mock" in online("models").output


@pytest.mark.parametrize(
    ("value", "told"),
    [("socks5://127.0.0.1:9", "pip install socksio"), ("nonsense://x", "Write a proxy as http://HOST:PORT")],
)
def test_a_proxy_that_cannot_be_used_says_what_to_do(
    sage: Sage, environment: pytest.MonkeyPatch, value: str, told: str
) -> None:
    environment.setenv("SAGE_GATEWAY_URL", "http://gateway.test")
    environment.setenv("ALL_PROXY", value)
    ran = sage("models")
    assert ran.exit_code == 2
    assert "ALL_PROXY" in ran.stderr
    assert told in ran.stderr
    assert "fault of sage" not in ran.stderr


def test_doctor_tells_of_a_proxy_that_cannot_be_used(sage: Sage, environment: pytest.MonkeyPatch) -> None:
    environment.delenv("HF_HUB_OFFLINE", raising=False)
    environment.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    ran = sage("doctor")
    assert " hub " in ran.output
    assert "The proxy settings (ALL_PROXY) ask for SOCKS" in ran.output
    assert " stack " in ran.output  # the checks after it
