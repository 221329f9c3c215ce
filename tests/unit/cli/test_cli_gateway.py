"""Whose stack answers: a home never uses that of another home unless it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import pytest
from tests.fakes.asgi_server import serving
from tests.fakes.fake_gateway import build_app

from sage_cli import locate
from sage_cli.locate import StackRecord

Sage = Callable[..., Any]

COMMANDS = [
    ["status"],
    ["models"],
    ["index", "list"],
    ["finetune", "list"],
    ["finetune", "start", "--task", "code", "--no-watch"],
    ["finetune", "quickstart", "code"],
    ["chat", "-m", "x", "--model", "mock"],
]


@pytest.fixture(scope="module")
def embedded() -> Iterator[str]:
    """The URL of a gateway of an embedded stack."""
    with serving(build_app("of-bob")) as url:
        yield url


@pytest.fixture
def found(sage: Sage, embedded: str, monkeypatch: pytest.MonkeyPatch) -> Sage:
    """`sage …` that finds that gateway where its own would be; what it may start, it starts."""
    httpx.post(f"{embedded}/reset").raise_for_status()
    monkeypatch.delenv("SAGE_GATEWAY_URL")
    monkeypatch.delenv("SAGE_AUTOSTART")
    monkeypatch.setenv("SAGE_GATEWAY_PORT", embedded.rpartition(":")[2])
    return sage


def write_record(url: str, stack_id: str, kind: Literal["embedded", "compose"] = "embedded") -> None:
    ports = locate.DEFAULT_PORTS | {"gateway": int(url.rpartition(":")[2])}
    locate.record_path().parent.mkdir(parents=True)
    locate.record_path().write_text(locate.record_text(StackRecord(kind, stack_id, ports)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_stack_of_another_home_is_refused(found: Sage, embedded: str, words: list[str]) -> None:
    ran = found(*words)
    assert ran.exit_code == 2
    assert f"Port {embedded.rpartition(':')[2]} belongs to a stack of another home" in ran.stderr
    assert f"SAGE_GATEWAY_URL={embedded}" in ran.stderr
    assert ran.stdout == ""
    assert httpx.get(f"{embedded}/requests").json() == [{"method": "GET", "path": "/healthz", "key": None}]


@pytest.mark.parametrize("kind", ["embedded", "compose"])
def test_a_record_of_a_stack_that_is_gone_does_not_make_it_ours(
    found: Sage, embedded: str, monkeypatch: pytest.MonkeyPatch, kind: Literal["embedded", "compose"]
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_PORT")
    write_record(embedded, "of-ours", kind)
    assert "another home" in found("models").stderr


def test_ones_own_is_used_and_told_with_its_home(
    found: Sage, embedded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_GATEWAY_PORT")
    write_record(embedded, "of-bob")
    ran = found("status")
    assert ran.exit_code == 0
    assert f"local processes at {embedded}, home {locate.home_root()}\n" in ran.output


def test_by_its_url_it_is_used_and_no_home_is_claimed(
    found: Sage, embedded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_GATEWAY_URL", embedded)
    ran = found("status")
    assert ran.exit_code == 0
    assert f"a stack at {embedded}\n" in ran.output


def test_a_stack_that_says_nothing_of_itself_is_used(
    found: Sage, gateway: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_GATEWAY_PORT", gateway.rpartition(":")[2])
    assert f"a stack at {gateway}\n" in found("status").output
    write_record(gateway, "of-ours", "compose")
    assert f"containers at {gateway}, home {locate.home_root()}\n" in found("status").output


def test_doctor_counts_its_port_as_taken(found: Sage, embedded: str) -> None:
    ran = found("doctor")
    assert f"{embedded.rpartition(':')[2]} (gateway) is in use by" in ran.output
    assert "not running; quickstart starts it" in ran.output
