"""Where the stack is: the environment first, then what `sage up` wrote down."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_cli import locate
from sage_cli.locate import StackRecord

VARIABLES = [
    *locate.PORT_VARIABLES.values(),
    "SAGE_GATEWAY_URL",
    "SAGE_ORCHESTRATOR_URL",
    "SAGE_HOST",
    "SAGE_RUN_DIR",
]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAGE_HOME", str(tmp_path))


def record(port: int, host: str = "127.0.0.1") -> None:
    locate.record_path().parent.mkdir(exist_ok=True)
    ports = locate.DEFAULT_PORTS | {"gateway": port}
    locate.record_path().write_text(locate.record_text(StackRecord("embedded", "x", ports, host)))


def test_the_default_the_record_the_port_and_the_url_each_win_over_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert locate.gateway_url() == "http://127.0.0.1:8080"
    record(9001)
    assert locate.gateway_url() == "http://127.0.0.1:9001"
    monkeypatch.setenv("SAGE_GATEWAY_PORT", "9002")
    assert locate.gateway_url() == "http://127.0.0.1:9002"
    monkeypatch.setenv("SAGE_GATEWAY_URL", "http://there:9003/v1/")
    assert locate.gateway_url() == "http://there:9003"


def test_jobs_go_to_the_orchestrator_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate.orchestrator_url() == locate.gateway_url()
    monkeypatch.setenv("SAGE_ORCHESTRATOR_URL", "http://there:8081")
    assert locate.orchestrator_url() == "http://there:8081"


def test_what_leads_past_a_stack_is_known_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    record(9001)
    started = locate.read_record()
    assert started
    monkeypatch.setenv("SAGE_GATEWAY_URL", "http://localhost:9001/v1")
    monkeypatch.setenv("SAGE_ORCHESTRATOR_URL", "http://127.0.0.1:8081")
    assert locate.urls_elsewhere(started) == {}
    monkeypatch.setenv("SAGE_GATEWAY_URL", "http://127.0.0.1:9009/v1")
    assert locate.urls_elsewhere(started) == {"SAGE_GATEWAY_URL": "http://127.0.0.1:9009"}


def test_a_stack_on_every_interface_is_called_on_this_machine() -> None:
    record(9001, "0.0.0.0")
    assert locate.gateway_url() == "http://127.0.0.1:9001"


@pytest.mark.parametrize(("name", "value"), [("SAGE_GATEWAY_PORT", "http"), ("SAGE_GATEWAY_URL", "there")])
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(locate.BadSettingError, match=name):
        locate.gateway_url()


def test_an_unreadable_record_is_no_record() -> None:
    record(9001)
    locate.record_path().write_text('{"kind": "embedded", "newer_field": 1}')
    assert locate.read_record() is None
