"""Where the parts of the embedded stack listen, and how long the trainer may take to leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_cli.stack.parts import Part, embedded_parts, stop_grace_from_env
from sage_contracts.errors import InvalidRequestError

PORTS = {"orchestrator": 1, "inference": 2, "gateway": 3, "tensorboard": 4}


def part(name: str, gateway_host: str) -> Part:
    return next(one for one in embedded_parts(PORTS, gateway_host, Path("output")) if one.name == name)


@pytest.mark.parametrize("gateway_host", ["0.0.0.0", "192.0.2.7"])
def test_tensorboard_which_asks_for_no_key_never_leaves_this_machine(gateway_host: str) -> None:
    pytest.importorskip("tensorboard")
    tensorboard = part("tensorboard", gateway_host)
    given = dict(zip(tensorboard.command[3::2], tensorboard.command[4::2], strict=True))
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "4")
    assert tensorboard.host == "127.0.0.1"


@pytest.mark.parametrize(("gateway_host", "called"), [("::", "127.0.0.1"), ("192.0.2.7", "192.0.2.7")])
def test_the_gateway_is_called_where_it_listens(gateway_host: str, called: str) -> None:
    assert part("gateway", gateway_host).host == called
    assert part("orchestrator", gateway_host).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("asked", "stop_wait_s"), [(None, 60), ("", 60), ("0", 60), ("300", 315), ("90.5", 106)]
)
def test_the_trainer_outlives_the_checkpoint_it_waits_for(
    asked: str | None, stop_wait_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAGE_STOP_GRACE_S", raising=False)
    if asked is not None:
        monkeypatch.setenv("SAGE_STOP_GRACE_S", asked)
    parts = embedded_parts(PORTS, "127.0.0.1", Path("output"), stop_grace_s=stop_grace_from_env())
    assert next(one.stop_wait_s for one in parts if one.name == "trainer") == stop_wait_s


@pytest.mark.parametrize("asked", ["soon", "-1", "inf", "nan"])
def test_a_grace_that_is_no_time_is_refused_by_name(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_STOP_GRACE_S", asked)
    with pytest.raises(InvalidRequestError, match="SAGE_STOP_GRACE_S"):
        stop_grace_from_env()
