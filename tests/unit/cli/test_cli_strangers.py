"""Another program where the stack is looked for: it is told as such, with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from tests.fakes.asgi_server import serving

Sage = Callable[..., Any]

COMMANDS = [
    ["status"],
    ["models"],
    ["index", "list"],
    ["finetune", "list"],
    ["finetune", "watch", "my-model"],
    ["finetune", "logs", "my-model"],
]


def program(status: int) -> FastAPI:
    """A web server that answers everything with a page."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    def _(path: str) -> HTMLResponse:
        return HTMLResponse(f"<!DOCTYPE HTML><title>{path}</title>", status)

    return app


@pytest.fixture(scope="module", params=[404, 200], ids=["finds-nothing", "has-a-page-for-everything"])
def stranger(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(program(request.param)) as url:
        yield url


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_another_program_on_the_port_is_told(
    sage: Sage, stranger: str, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_URL")
    monkeypatch.setenv("SAGE_GATEWAY_PORT", stranger.rpartition(":")[2])
    ran = sage(*words)
    assert ran.exit_code == 4
    assert f"What answers at {stranger} is no service of SAGE" in ran.stderr
    assert "SAGE_GATEWAY_PORT" in ran.stderr
    assert "<!DOCTYPE" not in ran.stderr


@pytest.mark.parametrize("variable", ["SAGE_GATEWAY_URL", "SAGE_ORCHESTRATOR_URL"])
def test_a_variable_that_points_to_another_program_is_named(
    online: Sage, stranger: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"{stranger}/v1")
    ran = online("finetune", "list")
    assert ran.exit_code == 4
    assert f"{variable} points there" in ran.stderr


@pytest.mark.parametrize("words", [["models"], ["chat", "-m", "x", "--model", "mock"]], ids=" ".join)
def test_debug_keeps_what_it_answered(sage: Sage, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setenv("SAGE_DEBUG", "1")
    with serving(program(404)) as url:
        monkeypatch.setenv("SAGE_GATEWAY_URL", url)
        assert "<!DOCTYPE HTML>" in str(sage(*words).exception.__cause__)


def test_the_page_of_a_proxy_whose_gateway_is_away_stays(sage: Sage, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(program(502)) as url:
        monkeypatch.setenv("SAGE_GATEWAY_URL", url)
        assert "HTTP 502 with a body" in sage("models").stderr
